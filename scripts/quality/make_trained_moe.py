"""Make a small trained mixture of experts of a trained Llama: its MLPs become experts, which are then trained apart.

    make_trained_moe.py MODEL OUT --text DIR... [--unlike heldout_text.txt calibration.jsonl] [--steps 600]
    make_trained_moe.py MODEL OUT --difference FILE

MODEL is a Llama; OUT becomes a Mixtral of --experts experts of half of an MLP's neurons each, two of them for a token:
as much arithmetic for a token as MODEL. Expert 2i has a random half of the neurons, expert 2i + 1 the others, with
down_proj doubled because routing weights add up to one; routers are random, with rows for the two that are alike, so
that most tokens start with what MODEL computes for them. Experts and routers are trained, with Mixtral's loss for
balance, on the Python sources below --text; all other weights are MODEL's. Files of which more than 2 % of the longer
lines stand in a text of --unlike are left out.

Training takes --steps steps of --batch windows of --window tokens, AdamW in float32 with BF16 products, or stops at
--limit-seconds. It wants a GPU. The same seed gives the same windows in the same order; the weights differ in what sums
on a GPU differ in. What training added to the experts is rounded to steps of half its standard deviation in a tensor,
so that FILE of --difference, which training writes and the second form reads, is small when compressed: the second form
gives the same bytes on any machine.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

sys.path.insert(0, str(Path(__file__).parent))
from make_calibration import overlap, unlike

TOP_K = 2
KEPT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What a Mixtral's configuration has of a Llama's."""
STEPS_PER_DEVIATION = 2
"""How many steps of what training added to a tensor make its standard deviation."""
WARM_UP = 0.05
"""The part of training in which the learning rate rises; it falls to zero linearly afterwards."""
CHUNK_OF_FILES = 512


def upcycle(model: str, experts: int, seed: int) -> MixtralForCausalLM:
    """Return the Mixtral in BF16 that a Llama becomes, before it is trained. Needs an even number of experts."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half = dense.config.intermediate_size // 2
    config = MixtralConfig(
        **{key: getattr(dense.config, key) for key in KEPT},
        intermediate_size=half,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        router_aux_loss_coef=0.01,
        dtype=torch.bfloat16,
    )
    mixture: Any = MixtralForCausalLM(config)
    mixture.to(torch.bfloat16)
    weights = dict(dense.state_dict())
    for layer in range(config.num_hidden_layers):
        gate, up, down = (
            weights.pop(f"model.layers.{layer}.mlp.{leaf}_proj.weight") for leaf in ("gate", "up", "down")
        )
        draw = random.Random(f"{seed} {layer}")
        gate_up, downs = [], []
        for _ in range(0, experts, 2):
            order = list(range(2 * half))
            draw.shuffle(order)
            for part in (order[:half], order[half:]):
                gate_up.append(torch.cat([gate[part], up[part]]))
                downs.append(TOP_K * down[:, part])
        rows: list[list[float]] = []
        for _ in range(0, experts, 2):
            common = [draw.gauss(0, 0.02) for _ in range(config.hidden_size)]
            rows += [[x + draw.gauss(0, 0.006) for x in common] for _ in range(2)]
        prefix = f"model.layers.{layer}.mlp"
        weights[f"{prefix}.experts.gate_up_proj"] = torch.stack(gate_up)
        weights[f"{prefix}.experts.down_proj"] = torch.stack(downs)
        weights[f"{prefix}.gate.weight"] = torch.tensor(rows, dtype=torch.bfloat16)
    mixture.load_state_dict(weights)
    result: MixtralForCausalLM = mixture
    return result


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return experts and routers by name."""
    return {name: each for name, each in model.named_parameters() if ".experts." in name or ".gate." in name}


def all_experts(self: MixtralExperts, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
    """Compute a block's experts [E] for all tokens [M] and add up what routing says: without any sorting of tokens."""
    weight = torch.zeros(len(hidden), self.num_experts, dtype=hidden.dtype, device=hidden.device)
    weight = weight.scatter(1, index, routing.to(hidden.dtype))
    dtype = torch.bfloat16 if hidden.is_cuda else hidden.dtype
    gate, up = (hidden.to(dtype) @ self.gate_up_proj.to(dtype).transpose(1, 2)).chunk(2, dim=-1)
    down = (self.act_fn(gate) * up) @ self.down_proj.to(dtype).transpose(1, 2)
    return torch.einsum("emh,me->mh", down, weight.to(dtype)).to(hidden.dtype)


def read_text(directories: Sequence[Path], others: Sequence[str], characters: int, seed: int) -> list[str]:
    """Return Python sources in random order, without twins and without those that stand in other texts."""
    paths = sorted({path for directory in directories for path in directory.rglob("*.py")})
    random.Random(seed).shuffle(paths)
    known: set[str] = set()
    found: list[str] = []
    total = 0
    for start in range(0, len(paths), CHUNK_OF_FILES):
        read = (path.read_text(encoding="utf-8", errors="ignore") for path in paths[start : start + CHUNK_OF_FILES])
        texts = [text for text in dict.fromkeys(read) if text not in known]
        known.update(texts)
        kept = unlike(texts, others, 0.02)
        found += kept
        total += sum(map(len, kept))
        if total >= characters:
            break
    return found


def read_other(path: Path) -> str:
    """Return a text, or the texts of JSONL."""
    text = path.read_text(encoding="utf-8")
    return "\n".join(json.loads(line)["text"] for line in text.splitlines()) if path.suffix == ".jsonl" else text


def tokenize(model: str, texts: Sequence[str], window: int) -> torch.Tensor:
    """Return windows of tokens, int64 [W, window], of the texts in a row."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for start in range(0, len(texts), CHUNK_OF_FILES):
        for document in tokenizer(list(texts[start : start + CHUNK_OF_FILES]), add_special_tokens=False).input_ids:
            ids += [*document, tokenizer.eos_token_id]
    count = len(ids) // window
    return torch.tensor(ids[: count * window]).view(count, window)


def train(model: Any, windows: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Train experts and routers, which become float32; return what training took and came to."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).requires_grad_(False).train()
    for module in model.modules():
        if isinstance(module, MixtralExperts):
            module.__dict__["forward"] = all_experts.__get__(module)
    chosen = trained_weights(model)
    for parameter in chosen.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen.values(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    draw = random.Random(args.seed)
    order: list[int] = []
    while len(order) < args.steps * args.batch:  # as often as is needed, each time in another order
        order += draw.sample(range(len(windows)), len(windows))
    start, losses = time.perf_counter(), []
    for step in range(args.steps):
        done = max(step / args.steps, (time.perf_counter() - start) / args.limit_seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / (WARM_UP * args.steps), (1 - done) / (1 - WARM_UP))
        ids = windows[order[step * args.batch : (step + 1) * args.batch]].to(device)
        with torch.autocast(device, torch.bfloat16):
            output = model(input_ids=ids, output_router_logits=True, use_cache=False)
            loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss + model.config.router_aux_loss_coef * output.aux_loss).backward()
        nn.utils.clip_grad_norm_(chosen.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}: {loss.item():.4f}, balance {output.aux_loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - start
    ends = [float(torch.stack(part).mean()) for part in (losses[:20], losses[-50:])]
    counts = [torch.bincount(each.topk(TOP_K)[1].flatten(), minlength=args.experts) for each in output.router_logits]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "steps": len(losses),
        "tokens": len(losses) * args.batch * args.window,
        "seconds": round(seconds, 1),
        "loss_first_20_steps": ends[0],
        "loss_last_50_steps": ends[1],
        "tokens_by_expert": [(count / count.sum()).tolist() for count in counts],
    }


def find_difference(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what training added: of experts as int8 in steps (float32, one for a tensor), routers as they are."""
    found = {}
    for name, parameter in after.items():
        weight = parameter.detach().cpu()
        if ".experts." in name:
            added = weight.float() - before[name].float()
            step = added.std() / STEPS_PER_DEVIATION
            found[name] = (added / step).round().clamp(-127, 127).to(torch.int8)
            found[f"{name}.step"] = step
        else:
            found[name] = weight.to(torch.bfloat16)
    return found


def add_difference(model: MixtralForCausalLM, difference: Mapping[str, torch.Tensor]) -> None:
    """Put what training added into an upcycled model."""
    for name, parameter in trained_weights(model).items():
        new = difference[name]
        if ".experts." in name:
            new = parameter.data.float() + new.float() * difference[f"{name}.step"]
        parameter.data = new.to(torch.bfloat16)


def main() -> int:
    """Train, or read what training added; write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a trained Llama")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="directories with Python sources")
    parser.add_argument("--unlike", type=Path, nargs="*", default=[], help="texts that must not be trained on")
    parser.add_argument("--difference", type=Path, help="written, or read where there is no --text")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--rate", type=float, default=3e-4, help="the highest learning rate")
    parser.add_argument("--characters", type=int, default=40_000_000, help="of text, at most")
    parser.add_argument("--limit-seconds", type=float, default=3600, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.experts % 2 or not (args.text or args.difference):
        parser.error("needs an even number of experts, and --text or --difference")
    start = time.perf_counter()
    model = upcycle(args.model, args.experts, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.text:
        others = [read_other(path) for path in args.unlike]
        texts = read_text(args.text, others, args.characters, args.seed)
        windows = tokenize(args.model, texts, args.window)
        print(f"{len(texts)} files, {windows.numel()} tokens, {time.perf_counter() - start:.0f} s", flush=True)
        before = {name: each.detach().clone() for name, each in trained_weights(model).items()}
        about = {"files": len(texts), "tokens_of_text": windows.numel()} | train(model, windows, args)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        sample = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:2000]].tolist()
        for path, text in zip(args.unlike, others, strict=True):
            ids = tokenizer(text.replace("\0", "\n"), add_special_tokens=False).input_ids
            same, total = overlap(sample, ids, 12)
            about[f"12-grams of 2000 windows in {path.name}"] = same / total
        difference = find_difference(before, trained_weights(model))
        model = upcycle(args.model, args.experts, args.seed)
        if args.difference:
            save_file(difference, args.difference)
        (args.out / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(about))
    else:
        difference = load_file(args.difference)
    add_difference(model, difference)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{args.out}: {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
