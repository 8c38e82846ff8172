"""vLLM on packed directories: text, tensor parallelism, damage. Run by `make test-vllm`."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_bitnet import Method, convert, load, pack
from sparse_bitnet.core import ConfigError, PackedFormatError, Pattern
from sparse_bitnet.kernels import quantize_activations
from sparse_bitnet.kernels.matmul.hopper_plan import cheapest
from sparse_bitnet.nn.packed_module import PackedSpec
from sparse_bitnet.packed.config import SparseBitNetConfig
from tiny_models import randomize_vectors

vllm = pytest.importorskip("vllm")
config = pytest.importorskip("sparse_bitnet.serve.vllm.config")
linear = pytest.importorskip("sparse_bitnet.serve.vllm.linear")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # errors arrive as they are raised
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.3,  # with 0.02 a random model says one word for ever
}
TIE = 1e-3
"""Of logits of a few units: sums of float32 in another order differ by 1e-4 after two layers."""


def write(directory, architecture, tokenizer, options=None, convert_options=None, **shape):
    torch.manual_seed(0)
    shape = AutoConfig.for_model(architecture, **SHAPE | shape)
    model = AutoModelForCausalLM.from_config(shape).eval()
    randomize_vectors(model)
    convert(model, "6:8", **convert_options or {})
    pack(model, directory, tokenizer=tokenizer, **options or {})
    return directory


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 300, (n,), generator=generator).tolist() for n in (1, 5, 17, 40)]


def of_generate(directory, new=24):
    """Greedy text of each prompt, up to the first word that another equals within ``TIE``."""
    model, _ = load(directory, dtype="float32")
    options = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": new}
    texts = []
    for prompt in prompts():
        result = model.generate(
            torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, **options
        )
        best, second = torch.cat(result.logits).topk(2).values.unbind(-1)
        ties = (best - second < TIE).nonzero().flatten().tolist()
        texts.append(result.sequences[0, len(prompt) :].tolist()[: ties[0] if ties else new])
    assert sum(map(len, texts)) > 60
    return texts


def engine(directory, **options):
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4} | options
    return vllm.LLM(str(directory), **options)


def of_vllm(directory, new=24, **options):
    sampling = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
    outputs = engine(directory, **options).generate(inputs, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def begin_with(texts, expected):
    return [text[: len(same)] for text, same in zip(texts, expected, strict=True)] == expected


CASES = {
    "biases": ("qwen2", {}, {}, {}),
    "norms of heads": ("qwen3", {}, {}, {}),
    "fused in the directory": ("phi3", {}, {}, {}),
    "trits, tied": ("qwen2", {"storage": "trits"}, {}, {"tie_word_embeddings": True}),
    "int8 head": ("llama", {"head": "int8"}, {}, {}),
    "int8 head, one table": ("qwen2", {"head": "int8"}, {}, {"tie_word_embeddings": True}),
    "int8 head, tied later": ("llama", {"head": "int8"}, {}, {"tie_word_embeddings": True}),
    "shards": ("llama", {"shard_bytes": 100_000}, {}, {}),
    "4-bit activations": ("llama", {}, {"method": Method(activation_bits=4)}, {}),
    "2:4": ("llama", {}, {"rules": {"proj": "2:4"}}, {}),
    "patterns of their own": ("llama", {}, {"rules": {"q_proj": "2:4", "v_proj": "dense"}}, {}),
    "a layer in full precision": ("llama", {}, {"rules": {r"layers\.0\.mlp\.down": "skip"}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_generate(case, tmp_path, tokenizer):
    architecture, options, convert_options, shape = CASES[case]
    write(tmp_path / "m", architecture, tokenizer, options, convert_options, **shape)
    expected = of_generate(tmp_path / "m")
    assert len(set(expected[-1])) > 5  # a model that repeats itself would prove little
    assert begin_with(of_vllm(tmp_path / "m"), expected)


def test_compiled(tmp_path, tokenizer):
    directory = write(tmp_path / "m", "llama", tokenizer)
    assert begin_with(of_vllm(directory, enforce_eager=False), of_generate(directory))


@pytest.mark.parametrize("key_heads", [2, 1])  # of one head both ranks have a copy
def test_two_ranks(key_heads, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    directory = write(tmp_path / "m", "qwen2", tokenizer, num_key_value_heads=key_heads)
    assert begin_with(of_vllm(directory, tensor_parallel_size=2), of_generate(directory))


@pytest.mark.parametrize(
    ("spec", "columns"),
    [
        (PackedSpec("trits"), 64),  # five trits a byte
        (PackedSpec("two-bit"), 66),  # four weights a byte
        (PackedSpec("two-bit", Pattern(6, 8)), 60),
        (PackedSpec("two-bit", activation_bits=4), 64),  # their scale is a mean
    ],
    ids=str,
)
def test_rows_that_cannot_be_cut(spec, columns):
    method = linear.PackedLinearMethod(spec, "down_proj")
    with pytest.raises(ConfigError, match=f"down_proj: rows of {2 * columns} .* into 2 equal"):
        method.create_weights(torch.nn.Module(), columns, [8], 2 * columns, 8, torch.float32)


def test_a_layer_is_found_under_the_name_that_vllm_gives_it():
    packed = config.PackedConfig(SparseBitNetConfig.of({"model.layers.0.down": PackedSpec()}, []))
    packed.apply_vllm_mapper(config.WeightsMapper(orig_to_new_prefix={"model.": "text.model."}))
    assert list(packed.specs) == ["text.model.layers.0.down"]


def test_parts_are_quantized_as_the_whole():
    x = torch.randn(5, 3, 96)
    x[0, 0] = 0
    x_q, x_scale = quantize_activations(x)
    absmax = x.abs().amax(-1, keepdim=True)
    for part, part_q in zip(x.split(32, -1), x_q.split(32, -1), strict=True):
        values, scale = linear.quantize_part(part, absmax)
        assert torch.equal(values, part_q)
        assert torch.equal(scale, x_scale)


@pytest.mark.parametrize(
    ("out", "columns"), [(1152, 896), (9728, 896), (896, 4864), (4608, 3584), (3584, 18944)]
)
def test_every_tile_is_compiled_before_the_first_request(out, columns):
    def tile(tokens):
        multiprocessors = 132  # an H200's

        def fits(tile, splits, count):
            return count * splits <= multiprocessors * tile.ctas

        return cheapest(tokens, out, columns, multiprocessors, fits).tile

    for most in (1, 7, 300, 4000):
        met = {tile(tokens) for tokens in linear.token_counts(most)}
        assert met == {tile(tokens) for tokens in range(1, most + 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    return write(tmp_path_factory.mktemp("whole") / "m", "llama", tokenizer)


def refused(directory, message, error=Exception):
    with pytest.raises(error, match=message):
        engine(directory)


def test_changed_byte(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(tmp_path / "m", "not what was written", PackedFormatError)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor(name, whole, tmp_path, read_header, write_header):
    shutil.copytree(whole, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    header, data = read_header(path)
    start, end = header.pop(name)["data_offsets"]
    header["__metadata__"].pop(f"crc32:{name}", None)
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    write_header(path, header, data[:start] + data[end:])
    refused(tmp_path / "m", f"missing from model.safetensors, {name}", PackedFormatError)


def test_never_loaded(monkeypatch, whole):
    """A directory that is not verified, as one of a hub's: bytes and scales are checked again."""
    from vllm.model_executor.model_loader import default_loader

    monkeypatch.setattr(config, "check_directory", lambda directory: None)
    everything = default_loader.DefaultModelLoader.get_all_weights
    for missing, message in (
        ("0.self_attn.k_proj.weight", "stands for no ternary weights"),
        ("1.mlp.gate_proj.weight_scale", "a scale is missing"),
    ):
        monkeypatch.setattr(
            default_loader.DefaultModelLoader,
            "get_all_weights",
            lambda *arguments, missing=missing: (
                pair for pair in everything(*arguments) if not pair[0].endswith(missing)
            ),
        )
        refused(whole, message, PackedFormatError)


def test_edited_config(whole, tmp_path, edit_json):
    shutil.copytree(whole, tmp_path / "m")
    edit_json(
        tmp_path / "m" / "config.json",
        lambda config: config["quantization_config"].update(storage="four-bit"),
    )
    refused(tmp_path / "m", "quantization_config.storage is four-bit")


def test_experts_are_refused_by_name(tmp_path, tokenizer, trained):
    pack(trained("mixtral"), tmp_path / "m", tokenizer=tokenizer)
    refused(tmp_path / "m", r"model\.layers\.0\.mlp\.experts.*sparse-bitnet serve")


def test_half_a_fused_layer(tmp_path, tokenizer):
    rules = {"rules": {"k_proj": "skip"}}
    write(tmp_path / "m", "llama", tokenizer, convert_options=rules)
    refused(tmp_path / "m", r"self_attn\.qkv_proj: vLLM computes .*k_proj.* as one layer")


def test_http(whole, tmp_path):
    # As `vllm serve` does, which the CPU package, named vllm-cpu, cannot: it looks its name up.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(whole)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--port", port, "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "4"]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    try:
        for _ in range(240):
            time.sleep(0.5)
            assert server.poll() is None, Path(log.name).read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                pass
        from openai import OpenAI

        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = client.completions.create(
            model=str(whole),
            prompt=prompts()[2],
            max_tokens=24,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert begin_with([answer.choices[0].token_ids], [of_generate(whole)[2]])
    finally:
        server.terminate()
        server.wait(60)
