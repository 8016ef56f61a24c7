"""Command line of the package: `python -m k25sys {doctor, generate, eval, run, recipes, plan, convert, verify}`."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from k25sys.evaluation.arguments import add_eval_arguments
from k25sys.planner.arguments import add_plan_arguments

if TYPE_CHECKING:
    from k25sys.data import ChatTokens, Tokenizer
    from k25sys.models import KimiK25


def main() -> int:
    """Parses the command line and runs one command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m k25sys", description="k25sys, a systems library for training")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="check this machine and the installation; exit 0 when both are fit")
    generate = commands.add_parser("generate", help="answer a prompt of text, pictures and videos")
    generate.add_argument("prompt", metavar="TEXT")
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="or sample:NAME; repeatable")
    generate.add_argument("--video", action="append", default=[], metavar="FILE", help="or sample:NAME; repeatable")
    _add_model_arguments(generate)
    generate.add_argument("--plain", action="store_true", help="media, then TEXT, to be continued: no conversation")
    generate.add_argument("--max-patches", type=int, metavar="N", help="of a picture or frame; larger ones are shrunk")
    generate.add_argument("--max-new-tokens", type=int, default=16)
    generate.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    generate.add_argument("--top-p", type=float, default=1.0)
    run = commands.add_parser("run", help="train by a recipe; under torchrun on a grid of processes")
    run.add_argument("recipe", metavar="RECIPE", help="see `python -m k25sys recipes`")
    run.add_argument("--preset", default="tiny", help="tiny, small, moonlight or k25")
    run.add_argument("--steps", type=int, metavar="N", help="the number of the last step, after --resume too")
    run.add_argument("--output", metavar="DIR", help="of metrics and checkpoints (default: runs/RECIPE-PRESET)")
    run.add_argument("--resume", action="store_true", help="from the newest intact checkpoint in DIR, if there is one")
    run.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="e.g. grid.pipeline=2; repeatable"
    )
    commands.add_parser("recipes", help="what `run` can train")
    evaluation = commands.add_parser("eval", help="score a model on a file of questions by a benchmark's rule")
    add_eval_arguments(evaluation)
    _add_model_arguments(evaluation)
    convert = commands.add_parser("convert", help="rewrite a checkpoint in another layout, tensor by tensor")
    convert.add_argument("source", metavar="SRC", help="folder with config.json and safetensors, in any layout")
    convert.add_argument("folder", metavar="DST", help="a new folder")
    convert.add_argument("--layout", choices=("released", "transformers"), required=True)
    convert.add_argument("--experts", choices=("bf16", "int4"), required=True, help="whole, or packed in four bits")
    convert.add_argument(
        "--scale-rule", choices=("amax/7", "amax/7.5"), default="amax/7", help="of experts that are not packed yet"
    )
    convert.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"),
        help="of what is not packed (default: bfloat16 with int4, else as it is)",
    )  # fmt: skip
    plan = commands.add_parser("plan", help="simulate a run on a cluster: step time, memory, what binds")
    add_plan_arguments(plan)
    verify = commands.add_parser("verify", help="exit 0 when a checkpoint is intact, else name the files at fault")
    verify.add_argument("folder", metavar="FOLDER")
    arguments = parser.parse_args()
    commands_by_name = {
        "doctor": _doctor, "generate": _generate, "eval": _eval, "run": _run, "recipes": _recipes, "plan": _plan,
        "convert": _convert, "verify": _verify,
    }  # fmt: skip
    return commands_by_name[arguments.command](arguments)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", default="tiny", help="a model with random weights (default: tiny)")
    source.add_argument("--checkpoint", metavar="FOLDER", help="a model with the weights of this folder, in any layout")
    parser.add_argument("--tokenizer", metavar="FILE", help="tiktoken.model (default: in FOLDER, else bytes)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of sampling")


def _doctor(arguments: argparse.Namespace) -> int:
    from k25sys.doctor import run_doctor

    return run_doctor()


def _generate(arguments: argparse.Namespace) -> int:
    def run() -> str:
        import torch

        from k25sys.models import generate

        model, tokenizer = _model_and_tokenizer(arguments)
        chat = _chat(arguments, tokenizer)
        clips = 0 if chat.grid_thw is None else len(chat.grid_thw)
        dtype = model.language_model.lm_head.weight.dtype
        print(f"prompt: {len(chat.token_ids)} tokens, {clips} clips; model in {dtype}")
        (sample,) = generate(
            model, [chat.token_ids], max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
            top_p=arguments.top_p, generator=torch.Generator().manual_seed(arguments.seed),
            pixel_values=chat.pixel_values, grid_thw=chat.grid_thw,
        )  # fmt: skip
        known = [token for token in sample.token_ids if token < tokenizer.vocab_size]
        padding = len(sample.token_ids) - len(known)  # a model's table may be longer than its vocabulary
        print(
            f"answer: {len(sample.token_ids)} tokens ({padding} of no text), log-probability {sum(sample.logprobs):.3f}"
        )
        return tokenizer.decode(known)

    return _reported("generate", run)


def _model_and_tokenizer(arguments: argparse.Namespace) -> "tuple[KimiK25, Tokenizer]":
    import torch

    from k25sys.checkpoint import load_hf, read_config
    from k25sys.data import ByteTokenizer, TiktokenTokenizer, check_special_tokens
    from k25sys.models import KimiK25
    from k25sys.models.presets import preset
    from k25sys.training.weights import checkpoint_folder, is_run_checkpoint, load_model

    folder = checkpoint_folder(arguments.checkpoint) if arguments.checkpoint else None
    if folder is not None and is_run_checkpoint(folder):
        model, tokenizer = load_model(folder, dtype=getattr(torch, arguments.dtype)), ByteTokenizer()
        if arguments.tokenizer:
            tokenizer = TiktokenTokenizer(arguments.tokenizer)
        check_special_tokens(tokenizer, model.config.tokens.named(), model.config.text.vocab_size)
        return model, tokenizer
    config = read_config(arguments.checkpoint) if arguments.checkpoint else preset(arguments.preset)
    with torch.device("meta"):
        model = KimiK25(config).to(getattr(torch, arguments.dtype))
    need = sum(value.nbytes for value in model.parameters())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ValueError(f"the model needs {need / 1e9:.0f} GB in {arguments.dtype}, this machine has {have / 1e9:.0f}")
    model.to_empty(device="cpu")
    if arguments.checkpoint:
        load_hf(model, arguments.checkpoint)
    else:
        model.reset_parameters(torch.Generator().manual_seed(arguments.seed))
    released = Path(arguments.checkpoint or "", "tiktoken.model")
    file = arguments.tokenizer or (released if arguments.checkpoint and released.is_file() else None)
    tokenizer = TiktokenTokenizer(file) if file else ByteTokenizer()
    check_special_tokens(tokenizer, model.config.tokens.named(), model.config.text.vocab_size)
    return model, tokenizer


def _chat(arguments: argparse.Namespace, tokenizer: "Tokenizer") -> "ChatTokens":
    from k25sys.data import (
        ChatTokens,
        ImagePart,
        MediaLimits,
        UserTurn,
        VideoPart,
        preprocess_image,
        preprocess_video,
        render_chat,
        sample_file,
    )  # fmt: skip
    from k25sys.data.media_text import clip_tokens

    def path_of(name: str) -> Path:
        return sample_file(name.removeprefix("sample:")) if name.startswith("sample:") else Path(name)

    limits = MediaLimits(padded_patches=arguments.max_patches)
    content: list[ImagePart | VideoPart] = []
    for name in arguments.image:
        pixels, grid = preprocess_image(path_of(name), limits)
        content.append(ImagePart(pixel_values=pixels, grid_thw=grid))
    for name in arguments.video:
        pixels, grid, timestamps = preprocess_video(path_of(name), limits)
        content.append(VideoPart(pixel_values=pixels, grid_thw=grid, timestamps=timestamps))
    if not arguments.plain:
        return render_chat([UserTurn(content=[*content, arguments.prompt])], tokenizer, prompt="instant")
    ids: list[int] = []
    for part in content:
        kind = "image" if isinstance(part, ImagePart) else "video"
        for number, grid_thw in enumerate(part.grid_thw.tolist()):
            ids += tokenizer.encode(part.timestamps[number]) if isinstance(part, VideoPart) else []
            ids += clip_tokens(kind, grid_thw, tokenizer)
    ids += tokenizer.encode(arguments.prompt)
    return ChatTokens(token_ids=ids, loss_mask=[False] * len(ids), media=content)


def _run(arguments: argparse.Namespace) -> int:
    from k25sys.errors import DataWorkerError, DivergenceError, RankFailureError
    from k25sys.recipes.command import run

    try:
        return _reported("run", lambda: run(arguments))
    except (RankFailureError, DataWorkerError, DivergenceError) as error:
        print(f"run: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def _recipes(arguments: argparse.Namespace) -> int:
    from k25sys.recipes.command import list_recipes

    return _reported("recipes", list_recipes)


def _eval(arguments: argparse.Namespace) -> int:
    from k25sys.evaluation.command import run

    return _reported("eval", lambda: run(arguments, lambda: _model_and_tokenizer(arguments)))


def _plan(arguments: argparse.Namespace) -> int:
    from k25sys.planner.command import run

    return _reported("plan", lambda: run(arguments))


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from k25sys.checkpoint import convert

    def run() -> str:
        convert(
            arguments.source, arguments.folder, layout=arguments.layout, experts=arguments.experts,
            scale_rule=arguments.scale_rule, dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        )  # fmt: skip
        return f"{arguments.folder}: written"

    return _reported("convert", run)


def _verify(arguments: argparse.Namespace) -> int:
    from k25sys.checkpoint import verify_folder

    return _reported("verify", lambda: f"{arguments.folder}: intact: {verify_folder(arguments.folder)}")


def _reported(command: str, run: Callable[[], str]) -> int:
    """Prints what `run` returns; of an error of the input or of the disk, one line. Returns the exit status."""
    try:
        text = run()
        if text:
            print(text)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
