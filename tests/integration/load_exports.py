"""Opens every export in a folder with peft or transformers alone, and compares its logits.

    python load_exports.py FOLDER

FOLDER holds a base of each architecture, `expected.safetensors` with the logits of each adapter,
and exports under ARCHITECTURE/FORM/TARGET. Run where forgetless is not installed, or is hidden.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

IDS = torch.arange(5, 29).reshape(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def main(root: Path) -> int:
    for name in ("forgetless", "trl"):
        hidden = name in sys.modules and sys.modules[name] is None
        assert hidden or importlib.util.find_spec(name) is None, f"{name} can be imported"
    expected = load_file(root / "expected.safetensors")
    count = 0
    for folder in sorted(path for path in root.glob("*/*/*") if path.is_dir()):
        architecture, form, _ = folder.relative_to(root).parts
        base = root / architecture / "base"
        loader = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
        if (folder / "adapter_config.json").is_file():
            untouched = loader.from_pretrained(base)
            before = logits(untouched)
            model = PeftModel.from_pretrained(untouched, str(folder))
            found = logits(model)
            assert not torch.allclose(found, before, atol=1e-2), f"{folder}: changes nothing"
        else:
            found = logits(loader.from_pretrained(folder))
        torch.testing.assert_close(
            found, expected[f"{architecture}.{form}"], rtol=1e-4, atol=1e-4, msg=str(folder)
        )
        count += 1
    return count


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
