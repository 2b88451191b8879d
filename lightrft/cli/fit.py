"""``lightrft fit`` and ``lightrft validate``: LightningCLI over RFTTrainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# Imported so that YAML may name their classes without the module's path.
import lightrft.callbacks
import lightrft.engines.transformers.engine
import lightrft.lightning_modules
import lightrft.rewards  # noqa: F401
from lightrft.data import PromptData
from lightrft.module import RFTModule
from lightrft.trainer import RFTTrainer


class RFTCLI(LightningCLI):
    """LightningCLI that drives :class:`~lightrft.trainer.RFTTrainer` instead of Lightning's ``Trainer``.

    Args:
        model_class: :class:`~lightrft.module.RFTModule` or a subclass of your own.
        datamodule_class: :class:`~lightrft.data.PromptData` or a subclass of your own.
        kwargs: further arguments of LightningCLI.
    """

    def __init__(
        self, model_class: type[RFTModule] = RFTModule, datamodule_class: type[PromptData] = PromptData, **kwargs: Any
    ) -> None:
        super().__init__(
            model_class,
            datamodule_class,
            trainer_class=RFTTrainer,  # type: ignore[arg-type]  # duck-typed but for the one override below
            seed_everything_default=0,
            # A mistyped option is an error, whatever it is the beginning of.
            parser_kwargs={"default_env": True, "allow_abbrev": False} | kwargs.pop("parser_kwargs", {}),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            **kwargs,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The stock method insists on a subclass of Trainer; the rest of LightningCLI does not.
        # Its seed is seed_everything's, which it takes where it is given none.
        parser.add_class_arguments(self.trainer_class, "trainer", skip={"seed"}, instantiate=False, sub_configs=True)
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self._datamodule_class, "data")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "datamodule"}, "validate": {"model", "datamodule"}}


def main(args: ArgsType = None) -> None:
    """Run ``fit`` or ``validate`` as ``sys.argv`` says, or as ``args`` where a program calls."""
    RFTCLI(args=args)
