"""Text in, rows of tokens out: sources, documents, tokens, their cache, and the rows made of them.

Read in that order; `open_rows` in rows.py puts them together.
"""

from rondo.data.documents import Documents, read_documents, text_of
from rondo.data.mixture import read_phases
from rondo.data.rows import Rows, TrainingRows, held_out_rows, open_rows
from rondo.data.sources import SAMPLES, parse_source, records
from rondo.data.tokens import (
    beginning,
    check_tokenizer,
    common_length,
    encode,
    load_tokenizer,
    packed_rows,
    pad_token,
    padded_batches,
    separator_of,
    tokenise,
)

__all__ = [
    "SAMPLES",
    "Documents",
    "Rows",
    "TrainingRows",
    "beginning",
    "check_tokenizer",
    "common_length",
    "encode",
    "held_out_rows",
    "load_tokenizer",
    "open_rows",
    "packed_rows",
    "pad_token",
    "padded_batches",
    "parse_source",
    "read_documents",
    "read_phases",
    "records",
    "separator_of",
    "text_of",
    "tokenise",
]
