"""Gathers what the embedder learns from: phrasings and the questions that no answer fits, without the answers.

It is a stage of its own so that an edited answer, or an intent by another name, trains nothing anew.
"""

from pathlib import Path

from model.artifact import write_json
from pipeline.author_data import read_contrast, read_entries
from pipeline.configs import TrainingSetConfig


def run(_config: TrainingSetConfig, entries: Path, contrast: Path, schemas: Path, output: Path) -> None:
    """Writes the texts as JSON: "phrasings" and "near_misses" by intent, and those "out_of_domain"."""
    read = read_entries(entries, schemas)
    apart = read_contrast(contrast, schemas, {entry.id for entry in read})
    texts = {
        "phrasings": [entry.phrasings for entry in read],
        "near_misses": [[question.text for question in apart if question.near == entry.id] for entry in read],
        "out_of_domain": [question.text for question in apart if question.near is None],
    }
    write_json(output, texts)
