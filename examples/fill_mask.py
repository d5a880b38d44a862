"""Ask a pre-trained run for the missing word: python examples/fill_mask.py runs/demo-..."""

import sys

from transformers import logging, pipeline

import regrow  # noqa: F401  (teaches transformers to load sparse models)

logging.set_verbosity_error()  # a pre-training model has a second head that fill-mask does not use
logging.disable_progress_bar()
fill_mask = pipeline("fill-mask", model=sys.argv[1])
for text in ("The city is the [MASK] of the country.", "He was born in [MASK] and died in 1945."):
    answers = ", ".join(f"{answer['token_str']} ({answer['score']:.2f})" for answer in fill_mask(text))
    print(f"{text}  ->  {answers}")
