"""The names of transformers' continuous batching and of uvicorn that the server relies on."""

import inspect

from transformers import ContinuousBatchingConfig, GenerationMixin
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


def names(function):
    return set(inspect.signature(function).parameters)


def test_the_manager():
    for method in ("start", "stop", "destroy", "pause", "cancel_request", "get_result", "__iter__"):
        assert callable(getattr(ContinuousBatchingManager, method)), method
    wanted = {"input_ids", "request_id", "max_new_tokens", "eos_token_id"}
    assert wanted <= names(ContinuousBatchingManager.add_request)
    assert "logit_processor" in inspect.getsource(ContinuousBatchingManager.__init__)
    wanted = {"generation_config", "continuous_batching_config"}
    assert wanted <= names(GenerationMixin.init_continuous_batching)


def test_the_sampler():
    processors = ContinuousBatchingLogitsProcessorList
    wanted = {"requests_in_batch", "arg_storage"}
    assert wanted <= names(processors.prepare_tensor_args)
    assert {"input_ids", "scores", "logits_processor_args"} <= names(processors.__call__)


def test_the_settings():
    wanted = {"page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch"}
    wanted |= {"use_cuda_graph", "use_async_batching", "allow_block_sharing"}
    assert wanted | {"auto_switch_to_flash"} <= names(ContinuousBatchingConfig)


def test_a_connection():
    for method in ("connection_made", "data_received", "on_response_complete", "connection_lost"):
        assert callable(getattr(H11Protocol, method)), method
    source = inspect.getsource(RequestResponseCycle.__init__)
    assert "self.more_body" in source and "self.response_complete" in source
