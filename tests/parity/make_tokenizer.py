"""Writes spiece.model and spiece.json: a small SentencePiece model, and what the library itself makes of some texts.

python make_tokenizer.py, with sentencepiece 0.2.3 installed (saccade does not need it). The texts are canonical as
SigLIP's: lower case, no punctuation, single spaces. The normalisation is a table of a few characters, as NFKC's is
400 kB.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
SUBJECTS = ["cat", "dog", "crushed yellow leaf", "red bicycle", "blood cell", "tomato", "zebra crossing", "quiet lake"]
PLACES = ["on the table", "in the garden", "under a microscope", "at night", "beside the river", "with two children"]
ADJECTIVES = ["small", "striped", "broken", "golden", "painted", "sleeping", "wooden", "blurred", "distant", "wet"]
TRAINING = [f"a photo of a {subject} {place}" for subject in SUBJECTS for place in PLACES]
TRAINING += [f"the {adjective} {subject}" for adjective in ADJECTIVES for subject in SUBJECTS]
TEXTS = [
    "",
    "a photo of a cat",
    "two zebras beside a quiet microscope",
    "unknown 漢字 letters and émigré",
    "ﬁne Å ﬂoor",
    "x",
    "qqqq jjjj",
    "the the the the the the the the",
]
RULES = {"ﬁ": "fi", "ﬂ": "fl", "Å": "å"}


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        rules = Path(place) / "rules.tsv"
        rules.write_text(
            "\n".join(f"{ord(a):X}\t{' '.join(f'{ord(x):X}' for x in b)}" for a, b in RULES.items()) + "\n"
        )
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TRAINING),
            model_prefix=str(Path(place) / "spiece"),
            vocab_size=200,
            hard_vocab_limit=False,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_tsv=str(rules),
        )
        model = (Path(place) / "spiece.model").read_bytes()
    (HERE / "spiece.model").write_bytes(model)
    reader = sentencepiece.SentencePieceProcessor(model_proto=model)
    said = [{"text": text, "tokens": reader.encode(text)} for text in TEXTS]
    (HERE / "spiece.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
