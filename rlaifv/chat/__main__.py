"""Talk to a vision-language model about a picture.

    python -m rlaifv.chat --image cat.jpg --question "What is in the picture?" [--model PATH_OR_HUB_ID] [--best-of 8]

Without --model it is the newest aligned policy of the pipeline, or the shipped tiny one; without --question, questions
are read line by line and every answer knows the turns before it. --best-of N samples N answers and says the one that
the model's own DPO reward against --reference ranks first (rlaifv.steps.self_feedback).
"""

import argparse
import sys
from collections.abc import Iterator

from rlaifv.chat import BASE_MODEL


def main(arguments: list[str] | None = None) -> None:
    """The command; what cannot work ends it with one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m rlaifv.chat", description="Ask a model about a picture")
    parser.add_argument("--image", required=True, help="an image file")
    parser.add_argument("--question", help="default: read questions line by line")
    parser.add_argument("--model", help="a checkpoint folder or hub id (default: the newest aligned policy)")
    parser.add_argument("--best-of", type=int, default=1, metavar="N", help="sample N answers, say the best")
    parser.add_argument("--reference", default=BASE_MODEL, help="for --best-of: what the model was aligned from")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="P", help="1.1 for RLAIF-V 12B; 1 (the default): none"
    )
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="search with N beams: 3 for RLAIF-V 7B")
    options = parser.parse_args(arguments)

    # here, for they take seconds to import, and --help should not
    import torch
    import transformers

    from rlaifv.chat.conversation import Aloud, Chat, default_model, load_chat_model, read_image

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        if options.beams > 1 and (options.best_of > 1 or options.temperature):
            raise ValueError("--beams looks for the likeliest answer: leave --best-of and --temperature out")
        image = read_image(options.image)
        model = options.model or default_model()
        vlm = load_chat_model(model)
        reference = load_chat_model(options.reference) if options.best_of > 1 else None
        if reference is not None and reference.fingerprint == vlm.fingerprint:
            raise ValueError(
                f"--best-of: {model} is its own --reference, so every answer is worth the same: give an aligned "
                "--model (`make repro` makes one)"
            )
        if options.model is None:
            print(f"({model})", file=sys.stderr)
        chat = Chat(
            vlm,
            image,
            reference,
            options.temperature,
            options.max_new_tokens,
            options.seed,
            options.repetition_penalty,
            options.beams,
        )
        for question in [options.question] if options.question is not None else ask_for_questions():
            if options.beams > 1:
                print(chat.ask(question), flush=True)
            elif options.best_of == 1:
                chat.ask(question, Aloud(vlm.tokenizer, skip_prompt=True, skip_special_tokens=True))
            else:
                print(chat.ask_best(question, options.best_of)[0], flush=True)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"chat: {error}")
    except (MemoryError, torch.OutOfMemoryError):
        sys.exit("chat: out of memory: give a smaller --model, image, --best-of or --max-new-tokens")
    except KeyboardInterrupt:
        print()


def ask_for_questions() -> Iterator[str]:
    """Lines of the standard input up to its end; a prompt where a person types."""

    def read() -> str:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()

    yield from filter(None, map(str.strip, iter(read, "")))


if __name__ == "__main__":
    main()
