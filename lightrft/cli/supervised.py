"""``lightrft supervised fit|validate|test|predict``: the stock LightningCLI over Lightning's own ``Trainer``."""

from __future__ import annotations

import warnings

from lightning.pytorch.cli import ArgsType, LightningCLI

# Imported so that YAML may name their classes without the module's path.
import lightrft.callbacks  # noqa: F401
from lightrft.data import SupervisedData
from lightrft.lightning_modules import ActorModule


def main(args: ArgsType = None) -> None:
    """Supervised fine-tuning of an actor. ``args`` are those after ``supervised``."""
    # sys.argv stays as it is, because launchers start further processes with it; LightningCLI warns of both.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    LightningCLI(
        ActorModule,
        SupervisedData,
        seed_everything_default=0,
        # A mistyped option is an error, whatever it is the beginning of.
        parser_kwargs={"default_env": True, "allow_abbrev": False},
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        args=args,
    )
