"""What a run's checkpoints hold of the weights that never train: nothing, but a reference to the one copy of them.

`--save_frozen` chooses. `"once"`: the first checkpoint of a process writes the copy to `frozen/` in the run's folder,
and all refer to it. The model at the end is whole, so that it takes the place of the copy, which is then removed.
`"never"`: checkpoints and the model refer to the folders that the members were loaded from. `"always"`: all are whole.

The copy is written before the first checkpoint that refers to it, and removed after the whole model is on disk: a
process that is killed in between leaves two copies, never none.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.frozen.loading import open_frozen
from logitmix.mixture.frozen.references import REFERENCES, STORE, frozen_files, read_references, sync, weight_files
from logitmix.mixture.frozen.sources import describe_sources, relative_to, validate_sources, without_source
from logitmix.mixture.frozen.store import POLICY, frozen_names, read_store, save_store, trained_state_dict
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.quantization import plain_tensors
from logitmix.training.checkpointing.folders import STAGING, saved_checkpoints


class FrozenWeights:
    """The frozen weights of a trainer's mixture, in the folders that the trainer writes.

    Raises `ValueError` for `save_frozen="never"` where a frozen member has no folder to refer to, and where the
    weights are sharded, which are saved whole.
    """

    def __init__(self, trainer: Trainer) -> None:
        args, model = trainer.args, trainer.model
        self.trainer = trainer
        self.mode = getattr(args, "save_frozen", "always") if isinstance(model, LogitMixForCausalLM) else "always"
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if is_sharded and isinstance(model, LogitMixForCausalLM) and model.config.quantized_models:
            raise ValueError(
                f"{model.config.quantized_models[0]} has quantised weights, which FSDP and DeepSpeed cannot shard; "
                "leave out its quantisation, or train with DDP"
            )
        if isinstance(model, LogitMixForCausalLM) and model.has_quantized_base:
            self.mode = "never"  # the base is on disk already, and is quantised again when it is loaded
        if self.mode == "never":
            _validate_never(trainer, is_sharded)
        self.changing: tuple[str, ...] = POLICY  # the members whose adapters are not frozen
        if getattr(args, "reanchor_steps", None) and isinstance(model, LogitMixForCausalLM):
            self.changing = tuple(model.config.members)
            if self.mode == "once" and len(model.config.model_names) > 1:
                self.mode = "always"  # the anchor of one checkpoint is not that of the next
        # what is pushed during training has to load without the run's folder
        is_pushed = args.push_to_hub and args.hub_strategy != HubStrategy.END
        if is_sharded or (is_pushed and self.mode == "once"):
            self.mode = "always"
        self._store: dict[str, Any] | None = None  # the reference to the copy, once it is written or found
        self._sources: dict[str, Any] | None = None

    @property
    def run(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def refers(self, is_checkpoint: bool) -> bool:
        """Whether what is saved refers to the frozen weights, instead of holding them."""
        return self.mode == "never" or (self.mode == "once" and is_checkpoint)

    def trained(self) -> dict[str, Tensor]:
        """The weights that a checkpoint holds."""
        return trained_state_dict(self.trainer.model, self.changing)

    def weights_to_save(self) -> list[Tensor]:
        """The weights that the next checkpoint writes: also the frozen ones, unless it refers to what is on disk."""
        model = self.trainer.model
        refers = self.mode == "never" or (self.mode == "once" and self._store is not None)
        weights = self.trained().values() if refers else (*model.parameters(), *model.buffers())
        plain = [tensor for weight in weights for tensor in plain_tensors(weight)]
        return list({tensor.data_ptr(): tensor for tensor in plain}.values())

    def write_references(self, folder: Path, final: Path) -> None:
        """Write `frozen.json` to `folder`, which becomes `final`, and before it the copy that it refers to."""
        if self.mode == "once" and self._store is None:
            self._store = save_store(self.trainer.model, self.run, self.run / STAGING / STORE, self.changing)
        if self._sources is None:
            self._sources = describe_sources(self.trainer.model, self.trainer.model.sources)
        references = {"store": self._store, "sources": relative_to(final, self._sources)}
        (folder / REFERENCES).write_text(json.dumps(references, indent=1))

    def load(self, checkpoint: Path) -> None:
        """Load the frozen weights that a checkpoint refers to, on resume.

        Raises `ValueError` where they are missing, or a member has changed since the run began.
        """
        references, model = read_references(checkpoint), self.trainer.model
        if isinstance(model, LogitMixForCausalLM) and model.config.quantized_models:
            saved = LogitMixConfig.from_pretrained(checkpoint)
            opened = open_frozen(checkpoint, references, saved)
            model.attach({name: m.to(model.device) for name, m in opened.items() if name != "policy"})
        if references is None:
            return
        validate_sources(model, references["sources"])
        stored = read_store(checkpoint, references, model.config)
        if stored is None:
            missing = [name for name in references["sources"] if name not in model.sources]
            if missing:
                raise ValueError(
                    f"the checkpoint {checkpoint} was saved without {missing[0]}, and the model that resumes was not "
                    "built from its folder; give that folder, as when the run began"
                )
            return
        for path in set(stored.values()):
            model.load_state_dict({n: w for n, w in load_file(path).items() if n in stored}, strict=False)
        if all(path.parent == self.run / STORE for path in stored.values()):
            self._store = references["store"]

    def drop_loaded(self, missing: list[str]) -> list[str]:
        """Of the weights that a checkpoint lacks, those that it does not refer to either."""
        model = self.trainer.model
        if self.mode == "always":
            quantized = model.config.quantized_models if isinstance(model, LogitMixForCausalLM) else ()
            return [name for name in missing if name.partition(".")[0] not in quantized]
        frozen = frozen_names(model, self.changing)
        return [name for name in missing if name not in frozen]

    # --- the model at the end -----------------------------------------------------------------------------------

    def before_model(self) -> None:
        """Keep a copy while the run's model, which checkpoints may refer to, is written again."""
        if self.mode == "once" and any(_reads_model(path, self.run) for path in saved_checkpoints(self.run)):
            self._store = save_store(self.trainer.model, self.run, self.run / STAGING / STORE, self.changing)
            shutil.rmtree(self.run / STAGING, ignore_errors=True)

    def after_model(self) -> None:
        """Remove the copy: the model that was just saved holds its weights."""
        if self.mode != "once" or self._store is None:
            return
        nested = [name for name in self._store["files"] if "/" in name]
        for path in (*weight_files(self.run), *(self.run / name for name in nested)):
            sync(path)
        for name in self._store["files"]:
            (self.run / STORE / name).unlink(missing_ok=True)
        for folder in {(self.run / STORE / name).parent for name in nested}:
            if not any(folder.iterdir()):
                folder.rmdir()
        if not any((self.run / STORE).iterdir()):
            (self.run / STORE).rmdir()
        self._store = None


def _validate_never(trainer: Trainer, is_sharded: bool) -> None:
    if is_sharded:
        raise ValueError(
            "save_frozen is 'never', but under FSDP or DeepSpeed checkpoints hold shards of all members; set "
            "save_frozen='always'"
        )
    unknown = without_source(trainer.model)
    if unknown:
        raise ValueError(
            f"save_frozen is 'never', but {unknown[0]} was not loaded from a folder that a checkpoint could refer to; "
            "give the folders of the members as the model and anchor, or set save_frozen='once'"
        )


def _reads_model(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint's frozen weights are in the model at the end of its run."""
    references = read_references(checkpoint)
    if references is None:
        return False
    try:
        files = frozen_files(checkpoint, references)
    except ValueError:  # they are nowhere
        return False
    return files is not None and files[0].parent == run
