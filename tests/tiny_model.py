"""A whole VocalNet with small random weights, in memory: every stage is the real class."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vocalnet.adapter import AdapterConfig, SpeechAdapter
from vocalnet.backbone import Backbone
from vocalnet.encoder import EncoderConfig, SpeechEncoder
from vocalnet.model import GenerationConfig, VocalNet, VocalNetConfig
from vocalnet.prompt import ChatPrompt
from vocalnet.speech_decoder import SpeechDecoder
from vocalnet.speech_decoder_config import SpeechDecoderConfig
from vocalnet.text_rows import PHONEMES, encode
from vocalnet.vocoder.estimator import EstimatorConfig
from vocalnet.vocoder.flow import Flow, mini_flow_config
from vocalnet.vocoder.source_filter import SourceFilterConfig, SourceFilterVocoder
from vocalnet.vocoder.token_encoder import TokenEncoderConfig

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WORDS = ["[UNK]", "user", "assistant", *(f"w{i}" for i in range(40))]
UNITS = 64


def tokenizer():
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<|start|>", "<|end|>"])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>", unk_token="[UNK]")
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    fast.chat_template = TEMPLATE
    return fast


def pronunciations(size):
    """A table in which every token is said in its own way."""
    rows = ["".join(PHONEMES[(7 * token + 3 * i) % 40] for i in range(1 + token % 5)) for token in range(size)]
    return torch.tensor([encode(row, token % 2 == 0) for token, row in enumerate(rows)], dtype=torch.uint8)


def tiny_llm():
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=words.eos_token_id, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # never the likeliest: answers run to their limit instead of ending at random
        model.get_input_embeddings().weight[words.eos_token_id] = 0
    return model


def tiny_model(seed=0, **generation):
    """`generation`: changes to GenerationConfig."""
    torch.manual_seed(seed)
    encoder = SpeechEncoder(EncoderConfig(width=32, layers=1, heads=2, ffn=48)).eval().requires_grad_(False)
    backbone = Backbone(tiny_llm(), "fp32")
    adapter = SpeechAdapter(AdapterConfig(encoder_width=32, hidden=32, width=48, mode="frames"))
    decoder = SpeechDecoder(
        SpeechDecoderConfig(
            llm_hidden_size=48, width=32, heads=2, ffn=48, units=UNITS, layers=2, projector_layers=1, mtp_modules=2,
            text_input="hidden+embedding+pronunciation", pronounced=len(tokenizer()), speech_position_scale=0.2,
        )
    )  # fmt: skip
    decoder.pronunciations.copy_(pronunciations(len(tokenizer())))
    decoder.prepare_inference()
    flow_config = mini_flow_config(UNITS)
    flow = Flow(
        type(flow_config)(
            **{
                **{name: getattr(flow_config, name) for name in flow_config.__dataclass_fields__},
                "encoder": TokenEncoderConfig(
                    width=32, heads=2, ffn=48, blocks=1, up_blocks=1, lookahead=3, conv_kernel=7, scale_input=False
                ),
                "estimator": EstimatorConfig(
                    width=32, heads=2, head_width=16, transformer_blocks=1, mid_stages=1, activation="silu"
                ),
                "steps": 2,
            }
        )
    )
    vocoder = SourceFilterVocoder(
        SourceFilterConfig(width=32, blocks=2, hidden=48, f0_width=16, f0_blocks=1, f0_hidden=16)
    )
    settings = GenerationConfig(**{"max_text_tokens": 24, "precision": "fp32", **generation})
    return VocalNet(
        VocalNetConfig("tiny", "none", "none", generation=settings),
        encoder,
        adapter.eval().requires_grad_(False),
        backbone,
        ChatPrompt(tokenizer()),
        decoder,
        flow.eval().requires_grad_(False),
        vocoder.eval().requires_grad_(False),
    )
