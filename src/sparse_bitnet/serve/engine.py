"""Inference engine: transformers' continuous batching, and a direct path for a single sequence.

transformers' manager runs all the time in a thread of its own and batches whatever is there. Of its
public interface are used ``init_continuous_batching``, ``add_request``, ``cancel_request``,
``pause``, iteration over results, and its ``logit_processor``, which ours takes the place of:
transformers can give each request a temperature and the like, but no seed, penalties, bias or more
than one log-probability. What it does badly is met here:

- its default cache takes most of the memory, and on a CPU steps get slower with its size: it is
  sized here, and a request that could never fit is refused, as it would end transformers' loop;
- a failure in one step ends the loop for good: what was under way fails, and the loop starts again;
- its queue has no bound and blocks: the bound is kept here, before anything is queued.

A generation that is alone is computed token by token while the manager pauses, which saves what the
manager does around every step. When another comes, it goes on in the batch, from the
tokens that it has; its sampler goes along.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

from sparse_bitnet.core import ConfigError, SparseBitNetError
from sparse_bitnet.modeling import KeyValueCache
from sparse_bitnet.serve.sampling import Sampler, SamplingOptions, Token
from sparse_bitnet.train.model import context_length

PAGE = 32  # tokens
BATCH_TOKENS = 256  # of prompts and answers in one step: bounds how long one step takes
MOST_RUNNING, MOST_WAITING = 32, 64
CACHE_TOKENS = 16_384  # by default on a CPU, if the context is not longer
ROOM = 1.25  # transformers keeps 15 % of the cache free
LOG = logging.getLogger("uvicorn.error")


class BusyError(SparseBitNetError):
    """The queue is full; ask again later."""


class GenerationError(SparseBitNetError):
    """The model failed while it computed an answer."""


class Generation:
    """One sequence under way: iterate over its tokens as they come, or cancel it.

    Attributes:
        prompt: token ids.
        times: seconds of the clock when it was asked for, and of each token.
        finish_reason: "stop" or "length", once it has ended.
    """

    def __init__(
        self, name: str, prompt: list[int], options: SamplingOptions, eos: set[int], streams: bool
    ) -> None:
        self.name, self.prompt, self.options = name, prompt, options
        self.sampler = Sampler(options)
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.times = [time.perf_counter()]
        self.cancelled = False
        self._eos, self._streams = eos, streams
        self._made: list[Token] = []  # and not delivered
        self._error: GenerationError | None = None
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[list[Token], bool]] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        is_last = False
        while not is_last:
            tokens, is_last = await self.queue.get()
            if tokens:
                yield tokens
        if self._error is not None:
            raise self._error

    def choose(self, logits: Tensor, likeliest: int) -> int:
        """The next token by its logits; :func:`deliver` gives it on to who iterates."""
        token = Token(likeliest) if self.sampler.is_argmax else self.sampler.choose(logits)
        self.ids.append(token.id)
        self._made.append(token)
        self.times.append(time.perf_counter())
        if token.id in self._eos or self.sampler.is_complete:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.options.max_tokens:
            self.finish_reason = "length"
        return token.id

    def take(self) -> tuple[list[Token], bool] | None:
        """What there is to deliver, and whether it is the last; None if it can wait."""
        if not (self._streams or self.has_ended):
            return None
        made, self._made = self._made, []
        return made, self.has_ended

    def fail(self, message: str) -> None:
        """End it by an error, if it has not ended. From any thread."""
        if not self.has_ended:
            self._error, self.finish_reason = GenerationError(message), "error"
            deliver([self])

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None


def deliver(generations: list[Generation]) -> None:
    """Give a step's tokens on to who iterates over their generations. From any thread.

    In one call for all: each wakes the event loop, which then holds the interpreter's lock. Answers
    that nobody reads before their end wake it once.
    """
    items = [(one.queue, item) for one in generations if (item := one.take()) is not None]

    def put() -> None:
        for queue, item in items:
            queue.put_nowait(item)

    if items:
        try:
            generations[0].loop.call_soon_threadsafe(put)
        except RuntimeError:  # the server has stopped and its loop is closed
            for one in generations:
                one.cancelled = True


class Engine:
    """Computes generations of a loaded model, many at once.

    Args:
        model: loaded, on its device.
        cache_tokens: tokens of all sequences that are computed at once; chosen from what memory is
            free when left out.
        most_running, most_waiting: sequences at once; the others wait, and beyond are refused.

    Raises:
        ConfigError: for a cache that no sequence fits into.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache_tokens: int | None = None,
        most_running: int = MOST_RUNNING,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        if cache_tokens is not None and cache_tokens < 4 * PAGE:
            raise ConfigError(
                f"serve: --cache-tokens is {cache_tokens}; {4 * PAGE} is the smallest"
            )
        if most_running < 1 or most_waiting < 0:
            raise ConfigError("serve: --max-running has to be 1 or more, --max-waiting 0 or more")
        self._model: Any = model
        self.cache_tokens = cache_tokens or default_cache_tokens(model)
        self.context = min(context_length(model.config) or 2**31, int(self.cache_tokens / ROOM))
        self.most_running, self.most_waiting = most_running, most_waiting
        self.generations: dict[str, Generation] = {}
        self._numbers = itertools.count()
        self.eos = eos_ids(model)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        if self._model.config._attn_implementation not in ("sdpa", "eager"):
            self._model.set_attn_implementation("sdpa")
        self._manager: Any = self._model.init_continuous_batching(  # type: ignore[operator]
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=-(-self.cache_tokens // PAGE),
                max_batch_tokens=BATCH_TOKENS,
                max_requests_per_batch=most_running,
                use_cuda_graph=False,  # sampling is Python's, for each sequence
                use_async_batching=False,
                allow_block_sharing=False,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.logit_processor = _Samplers(self.generations)
        self._closing = False
        self._manager.start()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def tokens_in_use(self) -> int:
        """Tokens of all sequences that have not ended."""
        return sum(len(one.prompt) + len(one.ids) for one in list(self.generations.values()))

    def submit(
        self,
        prompts: Sequence[list[int]],
        options: Sequence[SamplingOptions],
        streams: bool = True,
    ) -> list[Generation]:
        """Start a generation for each prompt, or none. Call :meth:`cancel` for each when done.

        Args:
            streams: tokens are wanted as they come, not all at the end.

        Raises:
            BusyError: if more would wait than ``most_waiting``.
        """
        if len(self.generations) + len(prompts) > self.most_running + self.most_waiting:
            raise BusyError("all places of the queue are taken; ask again later")
        made = []
        for prompt, wanted in zip(prompts, options, strict=True):
            name = f"generation-{next(self._numbers)}"
            made.append(Generation(name, prompt, wanted, self.eos, streams))
        alone = not self.generations and len(made) == 1
        self.generations.update((one.name, one) for one in made)
        for one in made:
            if alone:
                threading.Thread(target=self._run_alone, args=(one,), daemon=True).start()
            else:
                self._add(one)
        return made

    def cancel(self, generation: Generation) -> None:
        """Forget a generation; its place is free after the step under way."""
        generation.cancelled = True
        if self.generations.pop(generation.name, None):
            # Ended ones too: a stop string or a complete grammar ends an answer, of which the
            # batch knows nothing.
            self._manager.cancel_request(generation.name)

    def close(self) -> None:
        """End the threads; what is under way fails. Again: nothing."""
        if self._closing:
            return
        self._closing = True
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it has never run
        for one in list(self.generations.values()):
            self.cancel(one)  # so that one that is computed alone lets the manager go on
        self._manager.stop(block=True, timeout=10, hard_stop=True)
        self._manager.destroy()

    def _add(self, one: Generation) -> None:
        """Let the batch compute the generation from the tokens that it has."""
        added = self._manager.add_request(
            one.prompt + one.ids,
            request_id=one.name,
            max_new_tokens=one.options.max_tokens - len(one.ids),
            eos_token_id=list(self.eos) or -1,
        )
        if added is None:  # the loop has failed and is about to start again
            one.fail("the engine is starting again; ask once more")
        if one.cancelled:
            self._manager.cancel_request(one.name)

    def _run_alone(self, one: Generation) -> None:
        """Compute a generation token by token until it ends or others come."""
        try:
            with self._manager.pause(), torch.no_grad():
                self._step_alone(one)
        except Exception as error:
            if not self._closing:
                LOG.exception("a generation failed")
            one.fail(f"{type(error).__name__}: {str(error)[:300]}")
        if not (one.cancelled or one.has_ended):
            self._add(one)

    def _step_alone(self, one: Generation) -> None:
        model = self._model
        cache = KeyValueCache(model.config)
        ids = torch.tensor([one.prompt], device=model.device)
        while not (one.cancelled or one.has_ended or len(self.generations) > 1):
            now, ids = ids[:, :BATCH_TOKENS], ids[:, BATCH_TOKENS:]
            found = model(input_ids=now, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if ids.shape[1] == 0:
                logits = found.logits[0, -1].float()
                token = one.choose(logits, int(logits.argmax()))
                deliver([one])
                ids = torch.tensor([[token]], device=model.device)

    def _watch(self) -> None:
        """Read the manager's results, of which failures matter, and start it again if it ends."""
        while not self._closing:
            for output in self._manager:
                one = self.generations.get(output.request_id)
                if one is not None and output.error is not None:
                    one.fail(output.error)
            if self._closing:
                break
            while (output := self._manager.get_result(timeout=0)) is not None:
                if one := self.generations.get(output.request_id):
                    one.fail(output.error or "the engine stopped")
            for one in list(self.generations.values()):
                one.fail("the engine stopped")
            LOG.error("the batch failed; it starts again")
            self._manager.start()


class _Samplers(ContinuousBatchingLogitsProcessorList):
    """Each sequence's own sampler in the place of transformers' logits processors.

    transformers announces a step's sequences by ``prepare_tensor_args`` and then calls with their
    logits. The chosen tokens are what its argmax finds in the result.
    """

    def __init__(self, generations: dict[str, Generation]) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._generations = generations
        self._names: list[str] = []

    def prepare_tensor_args(self, requests_in_batch: Any, arg_storage: Tensor) -> Tensor:
        self._names = [one.state.request_id for one in requests_in_batch if one.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Any, scores: Tensor, logits_processor_args: Any) -> Tensor:
        """Logits ``[rows, vocabulary]``; rows beyond the announced sequences mean nothing."""
        likeliest = scores.argmax(-1).tolist()
        chosen: list[Generation] = []
        for row, name in enumerate(self._names):
            one = self._generations.get(name)
            if one is None or one.has_ended:
                continue
            try:
                token = one.choose(scores[row], likeliest[row])
            except Exception as error:  # of this sequence alone, such as NaN
                LOG.exception("a generation failed")
                one.fail(f"{type(error).__name__}: {str(error)[:300]}")
                continue
            chosen.append(one)
            if token != likeliest[row]:
                scores[row, token] = torch.inf
        deliver(chosen)
        return scores


def eos_ids(model: PreTrainedModel) -> set[int]:
    """Token ids that end an answer."""
    config = model.generation_config
    found = None if config is None else config.eos_token_id
    return set(found if isinstance(found, list) else [] if found is None else [found])


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def default_cache_tokens(model: PreTrainedModel) -> int:
    """Room for one whole context and for many short ones, as far as free memory allows."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        free, wanted, share = torch.cuda.mem_get_info(model.device)[0], 2**18, 0.8
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        wanted, share = CACHE_TOKENS, 0.25
    wanted = max(wanted, int(ROOM * (context_length(model.config) or 0)))
    return max(4 * PAGE, min(wanted, int(share * free / cache_bytes_per_token(model))))
