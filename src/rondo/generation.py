"""Continue a prompt at several depths: one batch whose rows differ in depth."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from rondo.config import GenerateConfig
from rondo.data import encode, load_tokenizer, pad_token
from rondo.errors import UserError
from rondo.flops import costs_of
from rondo.loading import load_model
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import choose_device, choose_dtype, read_json


def load_recurrent(path: str, dtype: str, device: str) -> Any:
    """Load a recurrent checkpoint for inference.

    Raises:
        UserError: The directory holds none.
    """
    directory = Path(path)
    kind = read_json(directory / "config.json").get("model_type")
    if kind != "rondo":
        raise UserError(f"{path} is a {kind} model, not a recurrent one: convert it first")
    where = choose_device(device)
    model = load_model(RecurrentForCausalLM, directory, choose_dtype(dtype, where))
    return model.to(where).eval()


def check_cap(deepest: int, cap: int, model: str | Path) -> None:
    """Refuse depths that a model was not made for.

    Raises:
        UserError: The deepest is beyond the cap.
    """
    if deepest > cap:
        raise UserError(
            f"--recurrences {deepest} is beyond the model's cap of {cap} "
            f"(max_recurrences in {model}/config.json)"
        )


@torch.inference_mode()
def generate(config: GenerateConfig) -> list[dict[str, Any]]:
    """Answer the prompt at each depth.

    Returns:
        One dict per depth: the text, its tokens and the FLOPs they took.

    Raises:
        UserError: The model cannot be loaded, or a depth is beyond its cap.
    """
    model = load_recurrent(config.model, config.dtype, config.device)
    depths = list(config.recurrences or (model.config.num_recurrences,))
    check_cap(max(depths), model.config.max_recurrences, config.model)
    tokenizer = load_tokenizer(Path(config.model))
    prompt: Any = config.prompt
    if config.chat:
        if tokenizer.chat_template is None:
            raise UserError(f"{config.model} has no chat template: leave --chat")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    if not prompt:
        raise UserError("the prompt is empty: give some text with --prompt")
    # A chat template writes the beginning of the text itself.
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([tokens if config.chat else encode(tokenizer, prompt)], device=model.device)
    length = ids.shape[1]
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        torch.manual_seed(config.seed)
        sampling = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
        }
    start = time.perf_counter()
    output = model.generate(
        input_ids=ids.repeat(len(depths), 1),
        attention_mask=torch.ones_like(ids).repeat(len(depths), 1),
        num_recurrences=depths,
        state_seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=pad_token(tokenizer),
        **sampling,
    )
    seconds = time.perf_counter() - start
    return [
        answer(model, tokenizer, depth, length, row) | {"batch_seconds": seconds}
        for depth, row in zip(depths, output[:, length:].tolist(), strict=True)
    ]


def answer(model: Any, tokenizer: Any, depth: int, length: int, row: list[int]) -> dict[str, Any]:
    """Describe the continuation of a prompt of `length` tokens, up to where it ended itself."""
    ends = [place for place, token in enumerate(row) if token == tokenizer.eos_token_id]
    tokens = row[: ends[0]] if ends else row
    return {
        "num_recurrences": depth,
        "text": tokenizer.decode(tokens),
        "tokens": len(tokens),
        "flops_per_token": costs_of(model).forward_flops(depth, seq_len=length + len(tokens)),
    }


def run(config: GenerateConfig) -> None:
    """Run `rondo generate`.

    Raises:
        UserError: The model cannot be loaded, or a depth is beyond its cap.
    """
    answers = generate(config)
    if config.json_output:
        for one in answers:
            print(json.dumps(one, ensure_ascii=False))
        return
    print(config.prompt)
    for one in answers:
        print(
            f"\n--- r = {one['num_recurrences']} ({one['tokens']} tokens, "
            f"{one['flops_per_token']:.3g} FLOPs per token)"
        )
        print(one["text"].strip())
    print(f"\n{len(answers)} depths in one batch, {answers[0]['batch_seconds']:.1f} s")
