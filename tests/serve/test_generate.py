"""Generated text: the same from packed and trained models, streamed whole, reproducible."""

import pytest

from sparse_bitnet.core import ConfigError
from sparse_bitnet.packed.write import pack
from sparse_bitnet.serve.generate import COLDEST, Sampling, generate, generate_text
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.export import save_trained

PROMPT = "def main():"
DRAWS = Sampling(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=3)


@pytest.mark.parametrize("sampling", [None, DRAWS], ids=["greedy", "drawn"])
def test_packed_says_what_training_says(tmp_path, trained, tokenizer, sampling):
    model = trained("qwen2")
    save_trained(model, tokenizer, tmp_path / "trained", SparsityConfig(pattern="6:8"))
    pack(tmp_path / "trained", tmp_path / "packed", storage="trits")
    texts = [
        generate(tmp_path / name, PROMPT, max_new_tokens=30, sampling=sampling)
        for name in ("trained", "packed")
    ]
    assert texts[0] == texts[1]
    assert texts[0] == generate_text(model, tokenizer, PROMPT, 30, sampling)


@pytest.mark.parametrize("sampling", [None, DRAWS], ids=["greedy", "drawn"])
def test_streamed_pieces_are_the_text(pristine, sampling):
    pieces = []
    text = generate(
        pristine / "two-bit", PROMPT, max_new_tokens=40, sampling=sampling, write=pieces.append
    )
    assert "".join(pieces) == text and len(pieces) > 1


def test_seeds(pristine):
    def draw(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        return generate(pristine / "two-bit", PROMPT, max_new_tokens=20, sampling=sampling)

    assert draw(1) == draw(1) != draw(2)


def test_stops_where_the_context_ends(trained, tokenizer):
    model = trained("qwen2")
    prompt = "return " * 20
    used = len(tokenizer(prompt).input_ids)
    text = generate_text(model, tokenizer, prompt, max_new_tokens=10_000)
    assert len(tokenizer(text).input_ids) <= 64 - used + 8  # text may be cut into more tokens
    message = r"the prompt has \d+ tokens and the model's context 64; shorten the prompt"
    with pytest.raises(ConfigError, match=message):
        generate_text(model, tokenizer, "return " * 80)


def test_an_empty_prompt_starts_from_the_first_token(trained, tokenizer):
    assert isinstance(generate_text(trained("qwen2"), tokenizer, "", 5), str)


def test_a_prompt_that_is_no_text_and_no_length(trained, tokenizer):
    with pytest.raises(
        ConfigError, match="the text is not UTF-8 at character 3; write it in UTF-8"
    ):
        generate_text(trained("qwen2"), tokenizer, "caf\udce9", 5)
    with pytest.raises(ConfigError, match="--max-new-tokens is 0; it has to be 1 or more"):
        generate_text(trained("qwen2"), tokenizer, PROMPT, 0)


def test_the_coldest_draws_take_the_likeliest(trained, tokenizer):
    cold = generate_text(trained("qwen2"), tokenizer, PROMPT, 8, Sampling(temperature=COLDEST))
    assert cold == generate_text(trained("qwen2"), tokenizer, PROMPT, 8)


def test_a_directory_without_tokenizer(tmp_path, trained):
    pack(trained("qwen2"), tmp_path / "out")
    with pytest.raises(ConfigError, match="out has no tokenizer; copy its files there, or pack"):
        generate(tmp_path / "out", PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it has to be 0 or more"),
        ({"top_k": -1}, "--top-k is -1; it has to be 0 or more"),
        ({"top_p": 0}, r"--top-p is 0; it has to be in \(0, 1\]"),
        ({"top_p": 1.5}, r"--top-p is 1.5; it has to be in \(0, 1\]"),
        ({"repetition_penalty": 0}, "--repetition-penalty is 0; it has to be above 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it has to be a whole number of 64 bits"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf; it has to be finite"),
        ({"temperature": 1e-320}, "0 or at least 1e-30"),
    ],
)
def test_sampling_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
