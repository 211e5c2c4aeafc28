"""The exported folder needs torch and transformers, and no megatron_dmc."""

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

folder, tensors, name = sys.argv[1:]
torch.set_num_threads(1)
given = torch.load(tensors, weights_only=True)
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == f"DMC{name}Config"
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


NEURON = {"decision_source": "neuron", "window_size": 3}


@pytest.mark.parametrize(
    ("name", "dmc"),
    [("Llama", {}), ("Llama", NEURON), ("Mistral", {}), ("Qwen2", NEURON), ("Qwen3", NEURON)],
    ids=["llama-projection", "llama-neuron", "mistral-projection", "qwen2-neuron", "qwen3-neuron"],
)
def test_a_stranger_loads_and_generates(make_model, name, dmc, left_padded, tmp_path):
    model = make_model(dmc, name.lower())
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
    run_as_stranger(STRANGER, folder, tmp_path / "given.pt", name, folder=tmp_path)


def test_refuses_a_folder_that_is_no_export(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is not a model's"):
        export.write_modeling_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="model_type must be dmc_ and the name of a family, got 'llama'"):
        export.write_modeling_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dmc_llama"}))
    with pytest.raises(ConfigError, match="architectures must name one class that ends in ForCausalLM, got None"):
        export.write_modeling_code(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
