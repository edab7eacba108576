"""A tokenizer on another model: shared rows bit for bit, the others by orthogonal matching pursuit."""

import json

import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

import suture
from suture.checkpoints.tokenizers import token_keys
from suture.cli.main import main
from suture.errors import CheckpointError, ConfigError
from suture.file_merge.pursuit import pursue


def table(tensor):
    return lambda first, last: tensor[first:last]


def model(path, tokens, embedding, head=None, **more):
    path.mkdir()
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(embedding.shape[1])}
    if head is not None:
        tensors["lm_head.weight"] = head
    save_file(tensors, path / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": len(embedding), "eos_token_id": more.pop("eos", 0)}
    (path / "config.json").write_text(json.dumps(config))
    content = {"model": {"vocab": {token: row for row, token in enumerate(tokens)}}, **more}
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def rand(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_the_residual_never_grows_and_ends_below_where_it_began():
    found = pursue(rand(7, 24), table(rand(40, 24, seed=1)), 40, 12)
    steps = found.residuals
    assert (steps[:, 1:] <= steps[:, :-1] + 1e-6).all()
    assert (steps[:, -1] < 0.75 * steps[:, 0]).all()


def test_the_coefficients_are_those_of_least_squares_over_the_chosen_rows():
    targets, rows = rand(5, 20), rand(30, 20, seed=1)
    found = pursue(targets, table(rows), 30, 6)
    for target, chosen, coefficients in zip(targets, found.chosen, found.coefficients, strict=True):
        wanted = torch.linalg.lstsq(rows[chosen].double().T, target.double()[:, None]).solution[:, 0]
        torch.testing.assert_close(coefficients.double(), wanted, rtol=1e-4, atol=1e-5)
        assert len(set(chosen.tolist())) == 6


def test_each_step_takes_the_row_with_the_largest_cosine_by_hand():
    rows = torch.tensor([[10.0, 0.0, 0.0], [0.0, 0.1, 0.0], [1.0, 1.0, 0.0]])
    found = pursue(torch.tensor([[3.0, 1.0, 0.0]]), table(rows), 3, 2)
    assert found.chosen.tolist() == [[0, 1]]
    torch.testing.assert_close(found.coefficients, torch.tensor([[0.3, 10.0]]))
    torch.testing.assert_close(found.residuals, torch.tensor([[0.1**0.5, 0.0]]), atol=1e-6, rtol=1e-5)


def test_a_target_that_one_row_reaches_takes_no_more_and_a_zero_target_none():
    rows = rand(9, 8)
    found = pursue(torch.stack([-2 * rows[4], torch.zeros(8)]), table(rows), 9, 5)
    assert found.chosen[0, 0] == 4
    torch.testing.assert_close(found.coefficients[0], torch.tensor([-2.0, 0, 0, 0, 0]))
    assert not found.coefficients[1].any()


def test_blocks_of_the_table_do_not_matter(monkeypatch):
    targets, rows = rand(5, 20), rand(30, 20, seed=1)
    whole = pursue(targets, table(rows), 30, 6)
    monkeypatch.setattr("suture.file_merge.pursuit._BLOCK", 20 * 7)
    parts = pursue(targets, table(rows), 30, 6)
    assert torch.equal(parts.chosen, whole.chosen)


@pytest.mark.parametrize("memory", ["300MB", "20kB"])
def test_shared_tokens_keep_their_rows_and_tokens_in_their_span_are_recovered(memory, tmp_path):
    shared, turn = rand(6, 8), rand(8, 8, seed=5)
    mix = torch.tensor([[0.0, 2.0, 0.0, -1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0, 1.0, 0.0]])
    donor = torch.cat([(mix @ shared), shared.flip(0)])  # two new tokens, and the shared ones in another order
    own = shared @ turn
    head = rand(6, 8, seed=7)
    donor_path = model(tmp_path / "donor", ["x", "y", *"fedcba"], donor, head=donor * 3, eos=1)
    model_path = model(tmp_path / "model", list("abcdef"), own, head=head, eos=5)
    out = suture.transplant(model_path, donor_path, tmp_path / "out", memory=memory)
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"][2:], own.flip(0))
    assert torch.equal(found["lm_head.weight"][2:], head.flip(0))
    torch.testing.assert_close(found["model.embed_tokens.weight"][:2], mix @ own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["lm_head.weight"][:2], mix @ head, rtol=1e-4, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (8, 1)
    assert (out / "tokenizer.json").read_bytes() == (donor_path / "tokenizer.json").read_bytes()
    record = json.loads((out / "suture_merge.json").read_text())["transplant"]
    assert (record["shared_tokens"], record["other_rows"]) == (6, 2)
    assert max(record["residuals"].values()) < 1e-5


def test_a_model_with_its_own_tokenizer_comes_back_as_it_is(tmp_path):
    weights, head = rand(5, 4).bfloat16(), rand(5, 4, seed=2).bfloat16()
    path = model(tmp_path / "model", list("abcde"), weights, head=head)
    found = load_file(suture.transplant(path, path, tmp_path / "out") / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], weights)
    assert torch.equal(found["lm_head.weight"], head)


def test_a_space_is_a_space_in_every_kind_of_tokenizer(tmp_path):
    byte_level = {"model": {"vocab": {"Ġthe": 0, "Ċ": 1, "é": 2, "Ã©": 3}}, "decoder": {"type": "ByteLevel"}}
    pieces = {"model": {"vocab": {"▁the": 0, "<0x0A>": 1, "é": 2}}, "decoder": {"pattern": "▁"}}
    for name, content in (("a.json", byte_level), ("b.json", pieces)):
        content["added_tokens"] = [{"content": "<s>", "id": 4}]
        (tmp_path / name).write_text(json.dumps(content))
    assert token_keys(tmp_path / "a.json") == {0: b" the", 1: b"\n", 2: b"\xe9", 3: "é".encode(), 4: "<s>"}
    assert token_keys(tmp_path / "b.json") == {0: b" the", 1: b"\n", 2: "é".encode(), 4: "<s>"}


def test_a_real_model_takes_a_tokenizer_and_loads_with_its_ties(tmp_path):
    from transformers import AutoModelForCausalLM

    for name, vocab in (("model", 64), ("donor", 70)):
        (tmp_path / name).mkdir()
        tiny_llama.save_base(tmp_path / name, vocab=vocab)
        content = {"model": {"vocab": {f"{name[0] if row > 50 else 't'}{row}": row for row in range(vocab)}}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    out = suture.transplant(tmp_path / "model", tmp_path / "donor", tmp_path / "out", atoms=4)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.get_input_embeddings().weight.shape[0] == 70
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits[..., :51], before(tokens).logits[..., :51])


def test_what_cannot_be_transplanted_is_refused_and_nothing_is_left(tmp_path):
    one = model(tmp_path / "one", list("ab"), rand(2, 4))
    other = model(tmp_path / "other", list("xy"), rand(2, 4))
    bare = model(tmp_path / "bare", list("ab"), rand(2, 4))
    (bare / "tokenizer.json").unlink()
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="no token in common"):
        suture.transplant(one, other, out)
    with pytest.raises(CheckpointError, match=r"'donor' has no tokenizer.json"):
        suture.transplant(one, bare, out)
    with pytest.raises(ConfigError, match="atoms=0"):
        suture.transplant(one, other, out, atoms=0)
    assert not out.exists()


def test_the_command_line_says_how_many_tokens_are_shared(tmp_path, capsys):
    one = model(tmp_path / "one", list("abc"), rand(3, 4))
    other = model(tmp_path / "other", list("bcd"), rand(3, 4, seed=1))
    assert main(["transplant", str(one), str(other), "--output", str(tmp_path / "out"), "--atoms", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2 tokens keep their rows; 1 row is a sum of at most 2 of these" in text
