"""Chats with a fine-tuned Phi-3 in llama.cpp: the pretrained model and the adapter, side by side.

After a run of phi3_chat.py, with `pip install xllamacpp` (llama.cpp for Python; needs no compiler):

    python examples/serve_llama_cpp.py phi3_chat_output "Hi, how are you?"

Without a prompt it asks for one, again and again. The two GGUF files that it writes beside the adapter,
base.gguf and adapter.gguf, are ordinary ones: any llama.cpp runs them (`llama-server -m base.gguf --lora
adapter.gguf`), and while this script runs, so does llama.cpp's own server, at the address that it prints.

For a model other than the default one, let llama.cpp's convert_hf_to_gguf.py write the base, and give it:

    python examples/serve_llama_cpp.py phi3-ultrachat --base Phi-3-mini-4k-instruct-q4.gguf
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from phi3 import checkpoints, fetch, gguf_files, pretrained
from phi3.errors import UserError

import lora

# What answers, and how much of the adapter's update it takes.
VOICES = {"pretrained": 0.0, "fine-tuned": 1.0}


def read(path: Path) -> lora.Adapter:
    """The adapter in a run's output directory, or in any file or folder that `lora.read_adapter` reads."""
    in_run = path / checkpoints.ADAPTER
    try:
        return lora.read_adapter(in_run if in_run.is_file() else path)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read an adapter: {error}") from error


def write_base(adapter: lora.Adapter, path: Path, dtype: str, cache_dir: Path) -> Path:
    """SmolLM2 as a Phi-3, which the adapter has to fit; it is the one model whose tokenizer is at hand as GGUF."""
    model, _ = pretrained.load(pretrained.SMOLLM2, cache_dir, dtype=torch.float32)
    known = dict(model.named_modules())
    unfit = [name for name, settings in adapter.modules.items() if not _fits(settings, known.get(name))]
    if unfit:
        raise UserError(
            f"the adapter was trained on another model than {pretrained.SMOLLM2!r}; give that model's GGUF file with "
            f"--base. What differs: {', '.join(unfit)}"
        )
    print(f"Writing {path} ({dtype})", flush=True)
    return gguf_files.export_base(model, fetch.fetch(fetch.SMOLLM2, cache_dir), path, dtype)


def _fits(settings: Any, module: Any) -> bool:
    try:
        settings.base.check(module)
    except (ValueError, AttributeError):  # another weight, or no such module
        return False
    return True


def llama_cpp() -> Any:
    """The package that brings llama.cpp."""
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError("llama.cpp is not here: first `pip install xllamacpp`") from error
    return xllamacpp


def start(base: Path, adapter: Path, threads: int, context: int) -> Any:
    """llama.cpp with both files, in a thread of this process."""
    xllamacpp = llama_cpp()
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx, params.n_parallel = context, 1
    params.cpuparams.n_threads = threads
    params.verbosity = 1  # errors only
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise UserError(f"llama.cpp cannot load {base} with {adapter}; above it says why") from error


def reply(server: Any, prompt: str, scale: float, max_new_tokens: int) -> str:
    """The likeliest reply (greedy), with this much of the adapter."""
    answer = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
            "lora": [{"id": 0, "scale": scale}],
        }
    )
    if "error" in answer:
        raise UserError(f"llama.cpp: {answer['error']['message']}")
    return answer["choices"][0]["message"]["content"].strip()


def show(server: Any, prompt: str, max_new_tokens: int) -> None:
    """What each voice says to a prompt."""
    for voice, scale in VOICES.items():
        print(f"  {voice}: {reply(server, prompt, scale, max_new_tokens)}", flush=True)


def count(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("adapter", type=Path, help="output directory of a run, or an adapter's file or folder")
    add("prompt", nargs="*", help="what to say; without any, you are asked")
    add("--base", type=Path, help="the base model as GGUF (default: SmolLM2 as a Phi-3, written anew)")
    add("--dtype", choices=gguf_files.DTYPES, default="f16", help="of the base that is written (default: f16)")
    add("--output-dir", type=Path, help="where the GGUF files go (default: beside the adapter)")
    add("--max-new-tokens", type=count, default=60, help="tokens in a reply, at most (default: 60)")
    add("--context", type=count, default=2048, help="tokens in a prompt and its reply, at most (default: 2048)")
    add("--threads", type=count, default=torch.get_num_threads(), help="threads of llama.cpp (default: PyTorch's)")
    add("--cache-dir", type=Path, help="as phi3_chat.py's")
    return parser.parse_intermixed_args(argv)  # prompts may come after flags


def run(flags: argparse.Namespace) -> None:
    """From the flags to the replies."""
    llama_cpp()  # to say so first, should it not be there
    adapter = read(flags.adapter)
    folder = flags.output_dir or (flags.adapter if flags.adapter.is_dir() else flags.adapter.parent)
    written = gguf_files.export_gguf(adapter, folder / "adapter.gguf")
    cache_dir = flags.cache_dir or fetch.default_cache_dir()
    base = flags.base or write_base(adapter, folder / "base.gguf", flags.dtype, cache_dir)
    server = start(base, written, flags.threads, flags.context)
    for prompt in flags.prompt:
        print(f"user: {prompt}")
        show(server, prompt, flags.max_new_tokens)
    if not flags.prompt:
        print(f"llama.cpp listens at {server.listening_address}. Say something; an empty line ends it.")
        while prompt := _line().strip():
            show(server, prompt, flags.max_new_tokens)


def _line() -> str:
    try:
        return input("user: ")
    except EOFError:
        return ""


def main(argv: list[str] | None = None) -> int:
    """Runs the example; 0 if all went well, 2 for a mistake in what it was given."""
    try:
        run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
