"""transformers' side of the decoding benchmark. Run without jaxlm, asked by lines:

    python decode_transformers.py dynamic|static|compiled

The three are its caches: one that grows, one of a fixed size, and that under `torch.compile`.
"""

import resource
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).parent))
from answering import answer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Side:
    """What answers."""

    def __init__(self, cache: str):
        self.cache = cache
        self.model = None

    def setup(self, folder: str, dtype: str) -> dict:
        """Load a model; what it is."""
        torch.set_float32_matmul_precision("highest")
        self.model = None  # which would count beside the next
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.model = model.to(DEVICE).eval()
        # A random model may say anything, and goes on to the end.
        self.model.generation_config.eos_token_id = None
        if self.cache == "compiled":
            mode = "reduce-overhead" if DEVICE == "cuda" else "default"
            self.model.forward = torch.compile(self.model.forward, mode=mode)
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict:
        """Continue prompts of one length greedily; ids of the continuations."""
        ids = torch.tensor(prompts, device=DEVICE)
        kind = {} if self.cache == "dynamic" else {"cache_implementation": "static"}
        with torch.no_grad():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                disable_compile=True,  # what is compiled is so already
                pad_token_id=0,
                **kind,
            )
        return {"made": made[:, ids.shape[1] :].tolist()}

    def steps(self, prompts: list[list[int]], new_tokens: int, count: int) -> dict:
        """Generate so many times and time it."""
        started = time.monotonic()
        for _ in range(count):
            self.generate(prompts, new_tokens)
        return {"seconds": time.monotonic() - started}

    def memory(self) -> dict:
        """Peak bytes: of the device or, on a CPU, resident."""
        if DEVICE == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated()}
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


if __name__ == "__main__":
    answer(Side(sys.argv[1]))
