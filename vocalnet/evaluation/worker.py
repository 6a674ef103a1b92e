"""One item of an evaluation: answer, measures, result. What an evaluation computes is here; `run` only collects it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vocalnet.audio import ANSWER_RATE_HZ, QUESTION_RATE_HZ, check_question, write_audio
from vocalnet.config import from_dict
from vocalnet.errors import AudioError, ConfigError
from vocalnet.evaluation.answer import Answer, Answerer, FolderAnswerer, ModelAnswerer
from vocalnet.evaluation.degrade import degrade
from vocalnet.evaluation.items import FileClip, Item
from vocalnet.evaluation.judge import Judge, JudgeConfig
from vocalnet.evaluation.scoring import score
from vocalnet.evaluation.seams import clicks, difference, tail_db
from vocalnet.evaluation.speech import WHISPER

Measure = Literal["transcript", "distillmos", "dnsmos", "utmos", "speaker", "seams", "rate", "retention"]
"""transcript: what a recogniser hears, and with it right answers and error rates; speaker: similarity to a recording;
seams: clicks, tail noise, streamed against offline; rate: words per minute; retention: the same question in writing."""

DEFAULT_MEASURES: tuple[Measure, ...] = ("transcript", "distillmos", "seams", "rate", "retention")


@dataclass(frozen=True)
class Settings:
    """All that a result depends on beside the items; a run with other settings cannot be resumed with these.

    Attributes:
        model: mini, or a model folder; "" where answers are given.
        answers: folder of answers made elsewhere.
        seed: of every conversation.
        mtp, decoding: changes to the model's own generation settings.
        recogniser: the Whisper that transcribes answers.
        measures: what is measured.
        voice: a recording of the voice that answers should have, for "speaker" where items name none.
        judge: a language model that judges answers too.
    """

    model: str = "mini"
    answers: str = ""
    seed: int = 0
    mtp: int | None = None
    decoding: Literal["accept-all", "verified", "relaxed"] | None = None
    recogniser: str = WHISPER
    measures: tuple[Measure, ...] = DEFAULT_MEASURES
    voice: str = ""
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in get_args(Measure)]
        if unknown:
            raise ConfigError(f"no measure '{unknown[0]}'; allowed: {', '.join(get_args(Measure))}")
        if self.voice and not Path(self.voice).is_file():
            raise ConfigError(f"no recording {self.voice} of the wanted voice; give a sound file as --voice")


@dataclass(frozen=True)
class Result:
    """What became of one item; one line of results.jsonl.

    Attributes:
        right_by_text, right: 0 … 1 by rules, of the model's text and of the transcript of its sound; None where rules
            cannot tell.
        right_written: the same of the answer to the written question.
        judged_by_text, judged: the judge's verdicts on text and transcript: 0 or 1 where the right answer is known,
            else 1 … 5; None without a judge.
        judge_tokens: of the judge's prompts and completions.
        word_errors … characters: transcript against text.
        measures: numbers of the sound, by name.
        timings: numbers that differ between runs, by name.
        audio: the answer's file, relative to the run's folder.
        error: why there is no answer.
    """

    id: str
    kind: str
    question: str
    accept: tuple[str, ...] = ()
    reference: str = ""
    subset: str = ""
    category: str = ""
    voice: str = ""
    condition: str = ""
    text: str = ""
    transcript: str = ""
    right_by_text: float | None = None
    right: float | None = None
    written: str = ""
    right_written: float | None = None
    judged_by_text: float | None = None
    judged: float | None = None
    judge_tokens: tuple[int, int] = (0, 0)
    word_errors: int = 0
    words: int = 0
    character_errors: int = 0
    characters: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    audio: str = ""
    error: str = ""

    @classmethod
    def from_json(cls, mapping: dict[str, Any]) -> Result:
        """The result that `asdict` made."""
        return from_dict(cls, mapping, "result")


class Worker:
    """Answers items and measures the answers; one in each process.

    Attributes:
        folder: of the run; answers go to its sub-folder `audio`.
    """

    def __init__(self, settings: Settings, answerer: Answerer, folder: Path) -> None:
        self.settings = settings
        self.answerer = answerer
        self.folder = folder

    def __call__(self, item: Item) -> Result:
        """The item's result; an answer that cannot be had is a wrong one, with the reason in `error`."""
        result = Result(
            id=item.id,
            kind=item.kind,
            question=item.question,
            accept=item.accept,
            reference=item.reference,
            subset=item.subset,
            category=item.category,
            voice=item.voice,
            condition=item.condition,
        )
        wrong = None if item.kind in ("open", "speak") else 0.0
        try:
            answer = self.answerer.answer(item, self._question(item))
        except AudioError as error:
            heard = wrong if "transcript" in self.settings.measures else None
            result = replace(result, right_by_text=wrong, right=heard, error=str(error))
        else:
            result = self._measured(item, answer, result)
        return self._judged(item, self._written(item, result))

    def _question(self, item: Item) -> np.ndarray | None:
        if item.clip is None or isinstance(self.answerer, FolderAnswerer):
            return None
        samples = degrade(item.clip.read(), item.condition, item.id, self.settings.seed)
        return check_question(samples, QUESTION_RATE_HZ)

    def _measured(self, item: Item, answer: Answer, result: Result) -> Result:
        file = Path("audio") / f"{item.id}.flac"
        write_audio(self.folder / file, answer.wave, ANSWER_RATE_HZ)
        result = replace(
            result,
            text=answer.text,
            right_by_text=score(item, answer.text) if answer.text else None,
            measures=self._sound(item, answer),
            timings=answer.timings,
            audio=str(file),
        )
        return self._transcribed(item, answer, result)

    def _transcribed(self, item: Item, answer: Answer, result: Result) -> Result:
        if "transcript" not in self.settings.measures:
            return result
        from vocalnet.evaluation import speech

        heard = speech.transcribe([answer.wave], name=self.settings.recogniser, language=item.language)[0]
        result = replace(result, transcript=heard, right=score(item, heard))
        if not answer.text:
            return result
        return replace(result, **asdict(speech.error_counts(answer.text, heard, item.language)))

    def _sound(self, item: Item, answer: Answer) -> dict[str, float]:
        """The wanted measures of the waveform."""
        found = {"audio_s": len(answer.wave) / ANSWER_RATE_HZ}
        if answer.tokens_per_step:
            found["tokens_per_step"] = answer.tokens_per_step
        if len(answer.wave):
            found |= self._opinions(answer.wave) | self._seams(answer)
            if "speaker" in self.settings.measures and (reference := self._reference(item)) is not None:
                from vocalnet.evaluation.voices import similarity

                found["speaker_similarity"] = similarity(answer.wave, reference)
            if "rate" in self.settings.measures and answer.text:
                from vocalnet.evaluation.speech import words_per_minute

                found["words_per_minute"] = words_per_minute(answer.text, answer.wave)
        return {name: round(value, 7) for name, value in found.items()}

    def _opinions(self, wave: np.ndarray) -> dict[str, float]:
        """Predicted opinion scores."""
        from vocalnet.evaluation import speech

        found = {}
        if "distillmos" in self.settings.measures:
            found["distillmos"] = speech.distillmos([wave])[0]
        if "dnsmos" in self.settings.measures:
            found |= {f"dnsmos_{name}": value for name, value in speech.dnsmos([wave])[0].items()}
        if "utmos" in self.settings.measures:
            found["utmos"] = speech.utmos([wave])[0]
        return found

    def _seams(self, answer: Answer) -> dict[str, float]:
        """What streaming did to the sound; speech made elsewhere has an end, but no known edges."""
        if "seams" not in self.settings.measures:
            return {}
        found = {"tail_db": tail_db(answer.wave)}
        if answer.speech_tokens and isinstance(self.answerer, ModelAnswerer):
            found["clicks"] = float(clicks(answer.wave, answer.edges))
            found["offline_difference"] = difference(answer.wave, self.answerer.offline(answer.speech_tokens))
        return found

    def _reference(self, item: Item) -> np.ndarray | None:
        if item.speaker is not None:
            return item.speaker.read(ANSWER_RATE_HZ)
        return FileClip(Path(self.settings.voice)).read(ANSWER_RATE_HZ) if self.settings.voice else None

    def _written(self, item: Item, result: Result) -> Result:
        """The same question in writing, for the retention."""
        if "retention" not in self.settings.measures or not isinstance(self.answerer, ModelAnswerer):
            return result
        if item.clip is None or item.earlier or item.condition:
            return result
        try:
            text = self.answerer.write(item.question, item.history)
        except AudioError:  # longer, or emptier, than a question may be
            return result
        return replace(result, written=text, right_written=score(item, text))

    def _judged(self, item: Item, result: Result) -> Result:
        """The judge's view of text and transcript."""
        if not self.settings.judge.url or item.kind in ("speak", "repeat"):
            return result
        judge = Judge(self.settings.judge)
        verdicts = [judge(item, text) if text else None for text in (result.text, result.transcript)]
        known = [verdict for verdict in verdicts if verdict is not None]
        worst = 0.0 if item.kind in ("match", "choice") else 1.0  # nothing was said
        values = [worst if verdict is None else verdict.value for verdict in verdicts]
        return replace(
            result,
            judged_by_text=values[0] if result.text or result.error else None,
            judged=values[1] if "transcript" in self.settings.measures else None,
            judge_tokens=(sum(v.prompt_tokens for v in known), sum(v.completion_tokens for v in known)),
        )


def load_worker(settings: Settings, folder: Path, load: Callable[[str], Any] | None = None) -> Worker:
    """The worker of a process, with its model loaded.

    Args:
        load: source → model; `VocalNet.load` by default.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: generation settings that the model does not allow.
    """
    if not settings.model:
        return Worker(settings, FolderAnswerer(Path(settings.answers) if settings.answers else None), folder)
    from vocalnet.model import VocalNet

    model = (load or VocalNet.load)(settings.model)
    changes = {key: getattr(settings, key) for key in ("mtp", "decoding") if getattr(settings, key) is not None}
    return Worker(settings, ModelAnswerer(model, replace(model.config.generation, **changes), settings.seed), folder)
