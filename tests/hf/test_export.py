"""The exported folder needs torch and transformers, and no megatron_dmc."""

import ast
import json
import os

import pytest
import torch

from megatron_dmc.config import ConfigError
from megatron_dmc.hf import export
from tests.support.strangers import run_as_stranger

STRANGER = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, tensors = sys.argv[1:]
torch.set_num_threads(1)
given = torch.load(tensors, weights_only=True)
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "DMCLlamaConfig"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    logits = model(given["ids"], attention_mask=given["mask"], use_cache=False).logits
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(given["ids"]).last_hidden_state
torch.testing.assert_close(logits, given["logits"], rtol=0, atol=1e-4)
torch.testing.assert_close(hidden, given["hidden"], rtol=0, atol=1e-4)
for beams in (1, 3):
    out = model.generate(given["ids"], attention_mask=given["mask"], max_new_tokens=12, do_sample=False, num_beams=beams)
    assert torch.equal(out, given[f"beams{beams}"])
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
assert torch.equal(again.lm_head.weight, model.lm_head.weight)
print("fine")
"""


@pytest.mark.parametrize("dmc", [{}, {"decision_source": "neuron", "window_size": 3}], ids=["projection", "neuron"])
def test_a_stranger_loads_and_generates(make_model, dmc, left_padded, tmp_path):
    model = make_model(dmc)
    folder, (ids, mask) = tmp_path / "export", left_padded
    model.save_pretrained(folder)
    export.write_modeling_code(folder)
    with torch.no_grad():
        given = {
            "ids": ids,
            "mask": mask,
            "logits": model(ids, attention_mask=mask).logits,
            "hidden": model.model(ids).last_hidden_state,
        }
    for beams in (1, 3):
        given[f"beams{beams}"] = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=beams
        )
    torch.save(given, tmp_path / "given.pt")
    run_as_stranger(STRANGER, folder, tmp_path / "given.pt", folder=tmp_path)


def test_copies_are_the_sources(tmp_path):
    """Only the imports differ, and the manifest lists what the model needs and nothing else."""

    def body(text):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if hasattr(node, "body") and isinstance(node.body, list):
                node.body = [x for x in node.body if not isinstance(x, ast.Import | ast.ImportFrom)]
        return ast.dump(tree)

    code = export.modeling_code()
    assert sorted(code) == sorted(f"{flat}.py" for flat in export.MANIFEST.values())
    for module, flat in export.MANIFEST.items():
        source, copy = export._source(module), code[f"{flat}.py"]
        assert "megatron_dmc" not in "".join(line for line in copy.splitlines() if "import" in line)
        if flat == export.MODELING:
            copy = copy[: copy.index("\n\nfrom typing import TYPE_CHECKING  # noqa: E402")]
        assert body(copy) == body(source), module

    needed, new = set(), {"megatron_dmc.hf.modeling_dmc"}
    while new:
        needed |= new
        found = set()
        for module in new:
            for node in ast.walk(ast.parse(export._source(module))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_dmc"):
                    found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names} & set(
                        export.MANIFEST
                    )
        new = found - needed
    # A package that is imported from only for its submodules needs no file of its own.
    assert set(export.MANIFEST) <= needed
    assert all(not export._source(module).strip() for module in needed - set(export.MANIFEST))


def test_rewriting_of_imports():
    source = (
        "import torch\n"
        "from megatron_dmc.ops.pooling import naive, pool as merge\n"
        "from megatron_dmc.ops.decisions import (\n    clear_channel,\n    hard_logits,\n)\n"
        "def f():\n    from megatron_dmc.ops.rotary import rotate\n"
    )
    assert export.flat_imports(source, "x") == (
        "import torch\n"
        "from . import ops_pooling_naive as naive\n"
        "from .ops_pooling import pool as merge\n"
        "from .ops_decisions import clear_channel\n"
        "from .ops_decisions import hard_logits\n"
        "def f():\n    from .ops_rotary import rotate\n"
    )
    with pytest.raises(ValueError, match=r"x imports run from megatron_dmc.training, which the export's manifest"):
        export.flat_imports("from megatron_dmc.training import run\n", "x")


def test_refuses_a_folder_that_is_no_export(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is not a model's"):
        export.write_modeling_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="model_type must be dmc_llama, got 'llama'"):
        export.write_modeling_code(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
