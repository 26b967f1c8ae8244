"""Upstream's tests that cannot hold for these models: a pattern of the tests' names, and the reason."""

_PROMPT = "prompt methods put vectors before the tokens, and are refused in a sentence (test_modeling_tahoe_x1.py)"
_TOP = "PEFT numbers layers below another module only, and those of a model without head are at its top, as in Llama"
_LEFT = "padding on the left is an error: <cls> and <drug> stand first in a row"
_OWN_NAMES = (
    "models are saved under our names of the weights, whatever names they were loaded from; the way back to the "
    "original's names is tested in tests/original"
)
_TEXT = "the tokenizer reads cells: a text is refused with a TypeError that says how to call it"
_VALUES = "padding fills values as well as tokens: features without expression_values are refused"
_WORDS = "this pipeline takes texts alone, and gives back their words"
_SHADOW = "ShadowPEFT runs a second model on token ids alone, without values; PEFT itself leaves encoders out by name"
_VOCABULARY = "tokens are genes of the vocabulary file, and the model has embeddings for no others"

SKIPS: tuple[tuple[str, str], ...] = (
    (r"adapters\.py.*(PrefixTuning|PromptEncoder|PromptTuning)Config", _PROMPT),
    (r"TestFeatureExtraction::test_training_layer_indexing", _TOP),
    (r"test_eager_matches_sdpa_inference_\w+_pad_left(?!_no_attn_mask)", _LEFT),
    (r"test_reverse_loading_mapping", _OWN_NAMES),
    (
        r"tokenizer\.py.*test_(batch_encode|call$|chat_template$|chat_template_batched|empty_input|encode_|"
        r"internal_consistency|mask_output|maximum_encoding|number_of_added|padding_to_multiple_of|pretokenized|"
        r"right_and_left|save_and_load_tokenizer|special_tokens_mask|token_type_ids)",
        _TEXT,
    ),
    (
        r"tokenizer\.py.*test_(added_tokens_serialization|bos_token|get_vocab|pad_token_initialization|"
        r"tokenize_special_tokens)",
        _VOCABULARY,
    ),
    (r"tokenizer\.py.*test_padding_side_in_kwargs", _LEFT),
    (r"tokenizer\.py.*test_padding_with_attention_mask", _VALUES),
    (r"test_pipeline_token_classification", _WORDS),
    (r"TestCellClassification::test_forward_with_labels\[ShadowConfig", _SHADOW),
)
