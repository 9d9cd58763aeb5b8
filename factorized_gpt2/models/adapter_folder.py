"""What stands beside an adapter's weights: the way to its base, and a README that names no folder of this machine."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..common.files import read_json
from ..common.markdown import code, escaped
from .adapter_base import way_to_base, write_way

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
LIBRARY, LORA_TAG = "peft", "lora"


def complete_adapter(temporary: Path, folder: Path) -> None:
    """Add to an adapter that PEFT has saved what PEFT does not know, in the place of PEFT's own README.

    Args:
        temporary: Where it was saved.
        folder: Where it will be.
    """
    lora = read_json(temporary / ADAPTER_CONFIG)
    base = lora.get("base_model_name_or_path") or ""
    way = way_to_base(base, folder)
    if way is not None:
        write_way(temporary, base, way)
    (temporary / "README.md").write_text(_readme(lora, base, way, folder.name), encoding="utf-8")


def lora_summary(lora: dict[str, Any]) -> str:
    """Say in Markdown what an adapter is, from its `adapter_config.json`."""
    targets = ", ".join(map(code, sorted(lora["target_modules"])))
    return f"A LoRA adapter of rank {escaped(lora['r'])}, alpha {escaped(lora['lora_alpha'])}, on {targets}"


def _readme(lora: dict[str, Any], base: str, way: str | None, name: str) -> str:
    is_local = not base or Path(base).exists()
    data = ModelCardData(
        base_model=None if is_local else base,  # which is what the Hub calls it
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        tags=["factorized_gpt2", "text-generation", LORA_TAG],
    )
    where = "a model of this machine" if way is None else f"the model in {code(way)}, seen from this folder"
    found = (
        "The base is found where it was, or, after both were moved together, the same way from here. " if way else ""
    )
    return f"""---
{data.to_yaml()}
---

# {escaped(name)}

{lora_summary(lora)} of {where if is_local else code(base)}.

```python
import factorized_gpt2
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained({name!r})  # this folder
model = model.merge_and_unload()  # as small as the base, and as fast
```

{found}`PeftModel.from_pretrained(base, folder)` joins the adapter to a base that is elsewhere.
"""
