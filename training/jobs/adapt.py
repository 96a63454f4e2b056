"""The route of a job that adapts a base model to stored tweets: job -> tweets -> fit -> register.

`adapt` is the route, and the functions below it are its steps. Compare `training.jobs.run`.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from db import jobs
from db.models import BaseModel, TrainingJob
from db.session import Database
from training import failpoint
from training.config import AdaptConfig, make_adapt_config
from training.jobs.base_models import fetch_base_model, register_adapted, store_adapted
from training.jobs.context import TrainingContext
from training.jobs.lease import Lease
from training.jobs.recording import job_checkpoints
from training.jobs.stored_tweets import StoredTexts, require_texts
from training.loop.masked_fit import Losses, MaskedFitInputs, TokenIds, masked_fit
from training.model.base_model import BaseModelFolder
from training.model.devices import pick_device
from training.model.language_model import LanguageModel, build_language_model, save_encoder
from training.model.masking import Masking
from training.text.tokenizer import TextEncoder, load_tokenizer

# Held out to measure the loss: this share of the texts, and at most so many.
HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 500
TEXTS_ENCODED_TOGETHER = 1_000


def adapt(database: Database, context: TrainingContext, job: TrainingJob, lease: Lease) -> int:
    """The route of a claimed job. Returns the id of the adapted base model that it registers.

    Raises like `training.jobs.run.train`.
    """
    config = make_adapt_config(**job.config)
    with ExitStack() as stack:
        base = stack.enter_context(fetch_base_model(database, context, config.base_model, config.base_revision, lease))
        tokenizer = load_tokenizer(base.folder)
        built = build_language_model(base, tokenizer, config)
        tweets = read_tweets(database, job, config, tokenizer, lease)
        tweets.record_report(lease, built.new_head)
        checkpoints = stack.enter_context(job_checkpoints(context, job))
        losses = masked_fit(
            built.model,
            MaskedFitInputs(
                tweets.train, tweets.held_out, Masking(tokenizer, config.mask_share), config, tokenizer.pad_token_id
            ),
            device=pick_device(context.device),
            checkpoints=checkpoints,
            on_step=lease.step,
        )
        lease.check()
        return register(database, context, lease, base, built.model, tokenizer, tweets, losses)


# --- tweets


@dataclass(frozen=True)
class Tweets:
    """Token ids of the texts to train on and of those held out, and how many tweets were read to find them."""

    train: list[TokenIds]
    held_out: list[TokenIds]
    read: int
    duplicates: int

    def record_report(self, lease: Lease, new_head: bool) -> None:
        """Store the report in the job's row, with the keys of a labelled dataset's report where they apply."""
        report = {
            "read": self.read,
            "duplicates": self.duplicates,
            "rows": len(self.train) + len(self.held_out),
            "sizes": {"train": len(self.train), "valid": len(self.held_out), "test": 0},
            "new_head": new_head,
        }
        lease.record(partial(jobs.record_data, job_id=lease.job_id, token=lease.token, sha256=None, report=report))


def read_tweets(
    database: Database, job: TrainingJob, config: AdaptConfig, tokenizer: PreTrainedTokenizerBase, lease: Lease
) -> Tweets:
    """Read and tokenise the newest texts that were stored when the job was submitted, so that a resumed job reads the
    same, and hold out a few. Raises `BadDataset` when there are too few."""
    texts = StoredTexts(database, lease, job.submitted_at, config.cleaner)
    rows, digests = _encoded(texts, config, TextEncoder(tokenizer))
    require_texts(len(rows))
    held_out = held_out_rows(digests)
    failpoint.passing("split")
    lease.check()
    return Tweets(
        [row for row, held in zip(rows, held_out, strict=True) if not held],
        [row for row, held in zip(rows, held_out, strict=True) if held],
        texts.read,
        texts.duplicates,
    )


def _encoded(texts: StoredTexts, config: AdaptConfig, encode: TextEncoder) -> tuple[list[TokenIds], NDArray[np.uint64]]:
    """Return the token ids of up to `config.tweets` texts, and the digests of the texts (N,)."""
    rows: list[TokenIds] = []
    digests: list[int] = []
    wanted = islice(texts, config.tweets)
    while chunk := list(islice(wanted, TEXTS_ENCODED_TOGETHER)):
        # As arrays: lists of Python integers take five times the memory.
        rows += [np.array(ids, np.int32) for ids in encode([text.text for text in chunk], config.max_length)]
        digests += [text.digest for text in chunk]
    return rows, np.array(digests, np.uint64)


def held_out_rows(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which of the texts with these digests (N,) are held out (N,): those with the smallest digests.

    It depends on the texts alone. So a base model that is adapted again is measured on texts that it has not seen.
    """
    smallest_first = np.argsort(digests)
    share = int((digests < np.uint64(HELD_OUT_SHARE * 2**64)).sum())
    held_out = np.zeros(len(digests), bool)
    held_out[smallest_first[: max(1, min(share, MOST_HELD_OUT))]] = True
    return held_out


# --- register


def register(
    database: Database,
    context: TrainingContext,
    lease: Lease,
    base: BaseModelFolder,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    tweets: Tweets,
    losses: Losses,
) -> int:
    """Store the adapted base model and register it. Returns its id."""
    url = store_adapted(context.input_store, lease.job_id, lambda folder: save_encoder(folder, model.cpu(), tokenizer))
    failpoint.passing("artifact")
    row = BaseModel(
        job_id=lease.job_id,
        base_model=base.name,
        base_revision=base.revision,
        url=url,
        tweets=len(tweets.train),
        loss_before=losses.before,
        loss_after=losses.after,
    )
    id_ = register_adapted(database, row, lease.token, lease)
    failpoint.passing("registered")
    return id_
