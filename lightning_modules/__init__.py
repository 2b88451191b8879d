"""Actor, critic and reward models as LightningModules, selected by ``class_path`` in YAML."""

if __name__ != "lightrft.lightning_modules":
    raise ImportError(
        "This folder is the package lightrft.lightning_modules: write `import lightrft.lightning_modules`."
    )

# Exports: every class that YAML may select.
from lightrft.lightning_modules.actor import ActorModule
from lightrft.lightning_modules.critic import CriticModule
from lightrft.lightning_modules.pretrained import LoRA
from lightrft.module import RFTModule

__all__ = ["ActorModule", "CriticModule", "LoRA", "RFTModule"]
