"""How `SIMTrainer` pushes: a real model card, files on a list only, one commit, and errors that are heard of."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from sim_hf.hub.allowed_files import CARD, MODEL_FILES, allowed_in
from sim_hf.hub.card_picture import SCENES_TEXT, scenes_picture
from sim_hf.hub.errors import hub_errors
from sim_hf.hub.model import PICTURE, REPLACED
from sim_hf.hub.repository import HubRepository
from sim_hf.training.trainer_card import card_of_trainer, facts_of_trainer

logger = logging.getLogger(__name__)
_PUSHED = re.compile(f"{MODEL_FILES.pattern}|{re.escape(CARD)}|{re.escape(PICTURE)}")


class PushesWithCard(Trainer):
    """The Hub methods of `SIMTrainer`. The stock ones upload the output folder: logs, pickled arguments and whatever else lies
    there, with a card that knows no mask AP; and a push in the background that fails is not heard of."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository when the Trainer is built: what is wrong with token or name shows before the training."""
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={HubStrategy(self.args.hub_strategy).value!r} would publish optimiser and memory bank; "
                "SIMTrainer pushes models: use 'every_save' or 'end'"
            )
        if self.is_world_process_zero():
            name = self.args.hub_model_id or self._folder.name
            with hub_errors(name, token or self.args.hub_token):
                super().init_hf_repo(token, private)
            self._repository(token, private, None)

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir)).absolute()

    def _repository(self, token: str | None, private: bool | None, revision: str | None) -> HubRepository:
        return HubRepository(
            str(self.hub_model_id),
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
        )

    def create_model_card(self, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """README.md in the output folder, with the options of `Trainer.create_model_card`: license, tags, dataset,
        dataset_tags, finetuned_from, model_name, language."""
        if not self.is_world_process_zero():
            return
        for name, content in self._card_files(**options).items():
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_bytes(content)

    def _card_files(self, **options: Any) -> dict[str, bytes]:
        trainer: Any = self  # a SIMTrainer
        facts = facts_of_trainer(
            self,
            trainer.train_rows,
            self.eval_dataset,
            supervision=trainer.supervision.supervision,
            used_masks=trainer.supervision.supervision == "full" or trainer.augmentation.use_masks,
        )
        picture = scenes_picture(trainer.exported, trainer.image_processor)
        repo_id = self.hub_model_id or self.args.hub_model_id or self._folder.name
        shown = {"picture": PICTURE, "picture_text": SCENES_TEXT} if picture else {}
        card = card_of_trainer(trainer.exported, repo_id, facts, **shown, **options)
        return {CARD: str(card).encode(), **({PICTURE: picture} if picture else {})}

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """The exported model, its processor and its card in one commit -> CommitInfo, or a Future of it when not `blocking`.
        kwargs: as for `create_model_card`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        files = allowed_in(self._folder, _PUSHED)
        message = commit_message or "End of training"
        if not blocking:
            return self._push_later(files, message, token, revision, private)
        return self._repository(token, private, revision).commit(files, message, replaces=REPLACED)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """In the background, with `hub_strategy="every_save"`; one at a time, unless `hub_always_push`."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        in_progress = self.push_in_progress
        if not self.args.hub_always_push and in_progress is not None and not in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        files = {**allowed_in(checkpoint_folder, MODEL_FILES), **self._card_files()}
        job = self._push_later(files, f"Training in progress, step {self.state.global_step}", None, None, None)
        running: Any = [] if in_progress is None or in_progress.is_done() else in_progress.jobs
        self.push_in_progress = PushInProgress([*running, job])  # pyright: ignore[reportArgumentType]  # its type says one job

    def _push_later(
        self, files: dict[str, Any], message: str, token: str | None, revision: str | None, private: bool | None
    ) -> Future:
        """Push a copy of `files`, which may be gone or overwritten by then; a failure is logged and ends no training."""
        staging = Path(tempfile.mkdtemp(prefix="sim-hf-push-"))
        staged: dict[str, Path | bytes] = {}
        for name, content in files.items():
            staged[name] = content if isinstance(content, bytes) else Path(shutil.copy(content, staging / Path(name).name))

        def push() -> CommitInfo:
            try:
                return self._repository(token, private, revision).commit(staged, message, replaces=REPLACED)
            except Exception as error:
                logger.error("%s was not pushed: %s", message, error)
                raise
            finally:
                shutil.rmtree(staging, ignore_errors=True)

        return HfApi().run_as_future(push)
