"""Flow matching from speech tokens to mel frames: CosyVoice2's flow with its parameter names, offline or in chunks.

`Flow.mel` computes whole utterances; `Flow.init_state` and `Flow.step` compute the same frames as tokens arrive, with
caches for every layer and every Euler step, so that a chunk costs the same however long the stream is.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.errors import ConfigError, VocalNetError
from vocalnet.parts import load_part, save_part
from vocalnet.vocoder.chunks import Ring, Span, offline_span
from vocalnet.vocoder.estimator import Estimator, EstimatorConfig, EstimatorState
from vocalnet.vocoder.token_encoder import (
    ConvTokenEncoder,
    ConvTokenEncoderState,
    TokenEncoder,
    TokenEncoderConfig,
    TokenEncoderState,
)

_OFFICIAL_NOISE_FRAMES = 50 * 300  # CosyVoice2 draws its noise once, for 300 s
_NOISE_BLOCK_FRAMES = 64
_CHUNKS_AT_ONCE = 4  # that a stream with bounded context computes in one pass


@dataclass(frozen=True)
class FlowConfig:
    """Sizes and sampling of the flow; the defaults are CosyVoice2-0.5B's, `mini_flow_config` is mini's."""

    tokens: int = 6561
    token_levels: tuple[int, ...] = ()  # FSQ levels, least significant first: tokens are embedded by their digits
    mel_bins: int = 80
    frames_per_token: int = 2
    chunk_tokens: int = 25
    left_chunks: int | None = (
        None  # chunks that attention sees to the left; None: all (then a stream has a maximum length)
    )
    encoder: TokenEncoderConfig = field(default_factory=TokenEncoderConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    speaker_width: int = 192  # 0: one voice, no speaker vector
    prompt: bool = True  # a channel for the prompt's mel
    hidden_condition: int = 0  # channels of the encoder's hidden rows given to the estimator beside its mel estimate
    normalise_mel: bool = False  # mel_mean and mel_std buffers: the flow works on normalised mels
    residual_scale: float = 0.0  # > 0: the flow samples (mel − estimate) / scale; 0: the mel itself, as in CosyVoice2
    steps: int = 10
    guidance: float = 0.7  # 0: one pass a step
    guidance_drop: float = 0.2  # share of training samples without conditions; 0 where there is no guidance
    temperature: float = 1.0
    sigma_min: float = 1e-6
    prior_weight: float = 0.0  # weight of the L1 between the encoder's mel estimate and the mel
    official_noise: bool = True  # upstream's buffer of 300 s; otherwise noise blocks made from noise_seed, without end
    noise_seed: int = 0

    def __post_init__(self) -> None:
        if self.token_levels and math.prod(self.token_levels) != self.tokens:
            raise ConfigError(
                f"flow token_levels {self.token_levels} make {math.prod(self.token_levels)} codes, not {self.tokens}"
            )
        if self.steps < 1 or self.chunk_tokens < 1:
            raise ConfigError(
                f"flow steps is {self.steps} and chunk_tokens {self.chunk_tokens}; both must be at least 1"
            )


def mini_flow_config(tokens: int, token_levels: tuple[int, ...] = ()) -> FlowConfig:
    """The small configuration: one voice, chunks of 0.2 s, a convolutional encoder, four steps without guidance."""
    return FlowConfig(
        tokens=tokens,
        token_levels=token_levels,
        chunk_tokens=5,
        left_chunks=20,
        encoder=TokenEncoderConfig(
            kind="convnext", width=256, ffn=512, blocks=3, up_blocks=3, lookahead=3, conv_kernel=7
        ),
        estimator=EstimatorConfig(
            width=128, heads=4, head_width=32, transformer_blocks=1, mid_stages=2, activation="silu"
        ),
        speaker_width=0,
        prompt=False,
        hidden_condition=80,
        normalise_mel=True,
        residual_scale=0.1,
        steps=4,
        guidance=0.0,
        guidance_drop=0.0,
        temperature=0.0,  # measured: 0.0 speaks better than any noise (DistillMOS 4.08; 0.4: 4.02, 0.8: 3.92)
        prior_weight=10.0,
        official_noise=False,
    )


@dataclass(frozen=True)
class FlowPrompt:
    """A voice to speak in: tokens (1, P), mel (1, P · frames per token, bins) and speaker vector (1, speaker width)."""

    tokens: Tensor
    mel: Tensor
    speaker: Tensor


@dataclass
class FlowState:
    """A stream: tokens waiting for a chunk to fill, and every layer's caches (the estimator's once per Euler step)."""

    pending: Tensor  # (1, tokens not consumed yet)
    token_ring: Ring
    frame_ring: Ring
    encoder: TokenEncoderState | ConvTokenEncoderState
    estimator: list[EstimatorState]
    time: list[Tensor]  # time embedding of each Euler step
    prompt_mel: Tensor | None  # (1, prompt frames, bins)
    speaker: Tensor | None
    noise: Tensor | None
    skip_frames: int  # frames of the prompt that are still to be computed and dropped
    finished: bool = False


@functools.lru_cache(maxsize=1)
def _official_noise(bins: int, seed: int) -> Tensor:
    """CosyVoice2's fixed noise (1, 15000, bins)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, bins, _OFFICIAL_NOISE_FRAMES), generator=generator).transpose(1, 2)


class _Decoder(nn.Module):
    """Holds the estimator under upstream's name `decoder.estimator`."""

    def __init__(self, estimator: Estimator) -> None:
        super().__init__()
        self.estimator = estimator


class Flow(nn.Module):
    """Speech tokens (25 Hz) → log-mel frames (50 Hz)."""

    mel_mean: Tensor
    mel_std: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        width, bins = config.encoder.width, config.mel_bins
        if config.token_levels:
            self.input_embedding: nn.Module = nn.Sequential(nn.Linear(len(config.token_levels), width), nn.GELU())
        else:
            self.input_embedding = nn.Embedding(config.tokens, width)
        self.spk_embed_affine_layer = nn.Linear(config.speaker_width, bins) if config.speaker_width else None
        encoder = ConvTokenEncoder if config.encoder.kind == "convnext" else TokenEncoder
        self.encoder = encoder(config.encoder, config.frames_per_token)
        self.encoder_proj = nn.Linear(width, bins)
        self.hidden_proj = nn.Linear(width, config.hidden_condition) if config.hidden_condition else None
        extra = config.hidden_condition + bins * (bool(config.speaker_width) + config.prompt)
        self.decoder = _Decoder(Estimator(config.estimator, 2 * bins + extra, bins))
        if config.normalise_mel:
            self.register_buffer("mel_mean", torch.zeros(bins))
            self.register_buffer("mel_std", torch.ones(bins))
        if config.residual_scale:  # start from the encoder's estimate and Gaussian noise around it
            nn.init.zeros_(self.decoder.estimator.final_proj.weight)
            nn.init.zeros_(self.decoder.estimator.final_proj.bias)  # type: ignore[arg-type]

    @classmethod
    def from_folder(cls, folder: Path) -> Flow:
        """The flow of a folder that `save` wrote, frozen, in evaluation mode; see `vocalnet.parts.load_part`."""
        return load_part(cls, FlowConfig, folder)

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors."""
        save_part(self, self.config, folder)

    # --- shared by training, whole utterances and streams -----------------------------------------------------------

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) → (B, T, width)."""
        if not self.config.token_levels:
            return self.input_embedding(tokens)
        digits, rest = [], tokens
        for levels in self.config.token_levels:
            digits.append((rest % levels) * (2.0 / (levels - 1)) - 1.0)
            rest = rest // levels
        return self.input_embedding(torch.stack(digits, dim=-1).to(self.encoder_proj.weight.dtype))

    def _normalise(self, mel: Tensor) -> Tensor:
        return (mel - self.mel_mean) / self.mel_std if self.config.normalise_mel else mel

    def _denormalise(self, mel: Tensor) -> Tensor:
        return mel * self.mel_std + self.mel_mean if self.config.normalise_mel else mel

    def _conditions(self, hidden: Tensor, speaker: Tensor | None, prompt: Tensor | None) -> tuple[Tensor, Tensor]:
        """The encoder's mel estimate (B, T, bins), and all that the estimator gets beside the noisy mel (B, T, ·).

        `prompt` (B, ≤ T, bins) is the part of the prompt's mel that falls on these frames.
        """
        estimate = self.encoder_proj(hidden)
        parts = [estimate]
        if self.hidden_proj is not None:
            parts.append(self.hidden_proj(hidden))
        batch, rows, bins = estimate.shape
        if self.spk_embed_affine_layer is not None:
            if speaker is None:
                raise VocalNetError("this flow needs a speaker vector; pass a FlowPrompt")
            parts.append(self.spk_embed_affine_layer(F.normalize(speaker, dim=1))[:, None].expand(-1, rows, -1))
        if self.config.prompt:
            known = estimate.new_zeros(batch, 0, bins) if prompt is None else prompt.to(estimate.dtype)
            parts.append(F.pad(known, (0, 0, 0, rows - known.shape[1])))
        return estimate, torch.cat(parts, dim=-1)

    def _velocity(
        self, x: Tensor, t: Tensor, time: Tensor, conditions: Tensor, span: Span, state: EstimatorState | None
    ) -> Tensor:
        """The velocity at x (B, T, bins) and time t (B or 1,), in float32; `time` is t's embedding."""
        inputs = torch.cat([x.to(conditions.dtype), conditions], dim=-1)
        velocity = self.decoder.estimator(inputs, time, span, state).float()
        if self.config.residual_scale:
            # What a unit Gaussian residual would give; the network adds the rest (preconditioning, arXiv:2206.00364).
            t = t[:, None, None]
            velocity = velocity + (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        return velocity

    def _noise(self, first: int, rows: int, device: torch.device, noise: Tensor | None) -> Tensor:
        """Fixed noise (1, rows, bins) of the frames from `first` on: the same for a frame however it is reached."""
        bins, config = self.config.mel_bins, self.config
        if noise is None and config.official_noise:
            noise = _official_noise(bins, config.noise_seed)
        if noise is not None:
            if first + rows > noise.shape[1]:
                raise VocalNetError(
                    f"frame {first + rows} is past the fixed noise of {noise.shape[1]} frames; begin a new stream"
                )
            return noise[:, first : first + rows].to(device)
        blocks = []
        for index in range(first // _NOISE_BLOCK_FRAMES, (first + rows - 1) // _NOISE_BLOCK_FRAMES + 1):
            generator = torch.Generator().manual_seed(config.noise_seed * 1_000_003 + index)
            blocks.append(torch.randn((_NOISE_BLOCK_FRAMES, bins), generator=generator))
        offset = first % _NOISE_BLOCK_FRAMES
        return torch.cat(blocks)[None, offset : offset + rows].to(device)

    def _times(self, device: torch.device) -> Tensor:
        """Flow times (steps + 1,), dense near 0 (cosine schedule)."""
        return 1 - torch.cos(torch.linspace(0, 1, self.config.steps + 1, device=device) * (0.5 * math.pi))

    def _time_embeddings(self, times: Tensor) -> list[Tensor]:
        return [self.decoder.estimator.embed_time(t[None]) for t in times[:-1]]

    def _sample(
        self,
        hidden: Tensor,
        span: Span,
        speaker: Tensor | None,
        prompt: Tensor | None,
        noise: Tensor,
        time: list[Tensor],
        states: list[EstimatorState] | None,
    ) -> Tensor:
        """Integrates the flow over the frames of `hidden` (B, T, width) → mel (B, T, bins), float32."""
        config = self.config
        estimate, conditions = self._conditions(hidden, speaker, prompt)
        times = self._times(hidden.device)
        x = (noise * config.temperature).expand(len(hidden), -1, -1)
        if config.guidance:
            conditions = torch.cat([conditions, torch.zeros_like(conditions)])
        for index in range(config.steps):
            state = None if states is None else states[index]
            doubled = torch.cat([x, x]) if config.guidance else x
            velocity = self._velocity(doubled, times[index : index + 1], time[index], conditions, span, state)
            if config.guidance:
                guided, free = velocity.chunk(2)
                velocity = (1 + config.guidance) * guided - config.guidance * free
            x = x + (times[index + 1] - times[index]) * velocity
        if config.residual_scale:
            x = estimate.float() + config.residual_scale * x
        return self._denormalise(x)

    # --- whole utterances -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mel(
        self,
        tokens: Tensor,
        streaming: bool = True,
        lengths: Tensor | None = None,
        prompt: FlowPrompt | None = None,
        noise: Tensor | None = None,
        final: bool = True,
    ) -> Tensor:
        """Mel frames of whole utterances.

        Args:
            tokens: (B, T) speech tokens.
            streaming: chunked masks (what `step` computes); otherwise every frame sees the whole utterance.
            lengths: (B,) tokens of each utterance, where the batch is padded; frames past them carry no meaning.
            prompt: the voice to continue; its frames are not returned.
            noise: (1, ≥ frames, bins) in place of the fixed noise.
            final: whether the last token ends the utterance; otherwise the lookahead's tokens give no frames yet.

        Returns:
            (B, frames per token · T, bins), float32, natural-log mel.
        """
        if prompt is not None:
            tokens = torch.cat([prompt.tokens.expand(len(tokens), -1), tokens], dim=1)
            lengths = None if lengths is None else lengths + prompt.tokens.shape[1]
        ahead = 0 if final else self.config.encoder.lookahead
        hidden, span = self._encode(tokens, lengths, streaming, ahead)
        frames = hidden.shape[1]
        drawn = self._noise(0, frames, hidden.device, noise)
        prompt_mel = None if prompt is None else self._normalise(prompt.mel)
        time = self._time_embeddings(self._times(hidden.device))
        mel = self._sample(hidden, span, None if prompt is None else prompt.speaker, prompt_mel, drawn, time, None)
        return mel if prompt is None else mel[:, prompt.mel.shape[1] :]

    forward = mel

    @torch.no_grad()
    def estimate(self, tokens: Tensor, lengths: Tensor | None = None, streaming: bool = True) -> Tensor:
        """The encoder's own mel estimate (B, frames, bins), meaningful where `prior_weight` trains it."""
        hidden, _ = self._encode(tokens, lengths, streaming)
        return self._denormalise(self.encoder_proj(hidden).float())

    def _encode(self, tokens: Tensor, lengths: Tensor | None, streaming: bool, ahead: int = 0) -> tuple[Tensor, Span]:
        """Hidden rows (B, ratio · (T − ahead), width) and their span; the last `ahead` tokens are lookahead only."""
        ratio, config = self.config.frames_per_token, self.config
        embedded = self._embed(tokens)
        rows = tokens.shape[1] - ahead
        chunk = config.chunk_tokens if streaming else None
        token_span = offline_span(rows, chunk, config.left_chunks, lengths, embedded)
        frame_lengths = None if lengths is None else lengths * ratio
        frame_span = offline_span(rows * ratio, chunk and chunk * ratio, config.left_chunks, frame_lengths, embedded)
        return self.encoder(embedded[:, :rows], embedded[:, rows:], token_span, frame_span, lengths), frame_span

    # --- streams ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_state(
        self, max_tokens: int = 1500, prompt: FlowPrompt | None = None, noise: Tensor | None = None
    ) -> FlowState:
        """The state of a new stream. `max_tokens` (prompt included) bounds it only where `left_chunks` is None."""
        config, device = self.config, self.encoder_proj.weight.device
        left = config.left_chunks
        chunks = -(-max_tokens // config.chunk_tokens) if left is None else left + _CHUNKS_AT_ONCE
        token_ring = Ring(config.chunk_tokens, chunks, left, device)
        frame_ring = Ring(config.chunk_tokens * config.frames_per_token, chunks, left, device)
        estimator = self.decoder.estimator
        passes = 2 if config.guidance else 1
        return FlowState(
            pending=torch.zeros(1, 0, dtype=torch.long, device=device) if prompt is None else prompt.tokens,
            token_ring=token_ring,
            frame_ring=frame_ring,
            encoder=self.encoder.init_state(1, token_ring, frame_ring),
            estimator=[estimator.init_state(passes, frame_ring) for _ in range(config.steps)],
            time=self._time_embeddings(self._times(device)),
            prompt_mel=None if prompt is None else self._normalise(prompt.mel),
            speaker=None if prompt is None else prompt.speaker,
            noise=noise,
            skip_frames=0 if prompt is None else prompt.mel.shape[1],
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: FlowState, final: bool = False) -> tuple[Tensor, FlowState]:
        """Takes the next tokens (1, n ≥ 0) and returns the mel frames (1, frames, bins) that are now certain.

        Frames come in whole chunks, each once its lookahead is there, until `final` ends the stream.

        Raises:
            VocalNetError: the stream has ended, or its caches are full.
        """
        if state.finished:
            raise VocalNetError("this flow stream has ended; begin a new one with init_state")
        chunk, lookahead = self.config.chunk_tokens, self.config.encoder.lookahead
        pending = torch.cat([state.pending, tokens], dim=1)
        mels = []
        while pending.shape[1] >= chunk + lookahead or (final and pending.shape[1] > 0):
            ready = pending.shape[1] if final else (pending.shape[1] - lookahead) // chunk * chunk
            rows = min(ready, state.token_ring.room * chunk)
            mels.append(self._chunks(pending[:, :rows], pending[:, rows : rows + lookahead], state))
            pending = pending[:, rows:]
        state.pending, state.finished = pending, final
        mel = torch.cat(mels, dim=1) if mels else self.encoder_proj.weight.new_zeros(1, 0, self.config.mel_bins).float()
        dropped = min(state.skip_frames, mel.shape[1])
        state.skip_frames -= dropped
        return mel[:, dropped:], state

    def _chunks(self, tokens: Tensor, ahead: Tensor, state: FlowState) -> Tensor:
        """Chunks of tokens (1, n) with those that follow (1, ≤ lookahead) → mel (1, frames, bins)."""
        rows, device = tokens.shape[1], tokens.device
        embedded = self._embed(torch.cat([tokens, ahead], dim=1))
        token_span = state.token_ring.advance(rows)
        span = state.frame_ring.advance(rows * self.config.frames_per_token)
        hidden = self.encoder(embedded[:, :rows], embedded[:, rows:], token_span, span, state=state.encoder)
        noise = self._noise(span.first, span.rows, device, state.noise)
        prompt = None if state.prompt_mel is None else state.prompt_mel[:, span.first : span.first + span.rows]
        return self._sample(hidden, span, state.speaker, prompt, noise, state.time, state.estimator)

    # --- training ---------------------------------------------------------------------------------------------------

    def cfm_loss(
        self,
        tokens: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        speaker: Tensor | None = None,
        streaming: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Conditional flow matching with straight paths (arXiv:2210.02747) plus the encoder's L1.

        Args:
            tokens: (B, T). mel: (B, frames per token · T, bins). lengths: (B,) tokens of each utterance.
            speaker: (B, speaker width), where the flow has speakers. streaming: train under the chunked masks.

        Returns:
            The loss, and `flow` (mean squared error of the velocity) and `prior` (L1, normalised mel) apart.
        """
        config, batch = self.config, len(mel)
        target, counted = self._normalise(mel.float()), self._counted(mel, lengths)
        total = counted.sum() * config.mel_bins
        hidden, span = self._encode(tokens, lengths, streaming)
        prior = self._prior(hidden, target, counted)
        if config.residual_scale:  # the encoder learns from its own loss alone, the estimator what that leaves over
            hidden = hidden.detach()
        estimate, conditions = self._conditions(hidden, speaker, self._training_prompt(target))
        if config.residual_scale:
            target = (target - estimate.detach().float()) / config.residual_scale
        if config.guidance_drop:
            kept = torch.rand(batch, 1, 1, device=mel.device) > config.guidance_drop
            conditions = conditions * kept
        t = torch.rand(batch, device=mel.device)
        noise = torch.randn_like(target)
        at = t[:, None, None]
        x = (1 - (1 - config.sigma_min) * at) * noise + at * target
        velocity = self._velocity(x, t, self.decoder.estimator.embed_time(t), conditions, span, None)
        wanted = target - (1 - config.sigma_min) * noise
        flow = ((velocity - wanted).square() * counted).sum() / total
        return flow + config.prior_weight * prior, {"flow": flow.detach(), "prior": prior.detach()}

    def prior_loss(
        self, tokens: Tensor, mel: Tensor, lengths: Tensor | None = None, streaming: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The encoder's L1 alone, of which `cfm_loss` is the rest: less than half the work. Arguments as there."""
        hidden, _ = self._encode(tokens, lengths, streaming)
        prior = self._prior(hidden, self._normalise(mel.float()), self._counted(mel, lengths))
        return self.config.prior_weight * prior, {"prior": prior.detach()}

    def _prior(self, hidden: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """L1 between the encoder's estimate and the normalised mel (B, frames, bins), over the frames that count."""
        error = (self.encoder_proj(hidden).float() - target).abs() * counted
        return error.sum() / (counted.sum() * self.config.mel_bins)

    def _counted(self, mel: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, frames, 1): 1 where a frame belongs to its utterance, 0 in the padding."""
        frames = torch.arange(mel.shape[1], device=mel.device)[None]
        whole = frames < mel.shape[1] if lengths is None else frames < lengths[:, None] * self.config.frames_per_token
        return whole.expand(len(mel), -1)[..., None].float()

    def _training_prompt(self, mel: Tensor) -> Tensor | None:
        """For half of the utterances, up to 30 % of the mel's start as the prompt, zeros elsewhere (as upstream)."""
        if not self.config.prompt:
            return None
        batch, frames, _ = mel.shape
        share = torch.rand(batch, device=mel.device) * 0.3 * (torch.rand(batch, device=mel.device) < 0.5)
        shown = torch.arange(frames, device=mel.device)[None] < (share * frames)[:, None]
        return mel * shown[..., None]
