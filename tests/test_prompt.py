"""The prompt against Qwen2-VL's own chat template, rendered by transformers' processor with real pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid, smart_resize
from gemvg_edge.marks import localise, mark
from gemvg_edge.prompt import CONTROL_TOKENS, PromptTemplate, check_query, encode_prefix, encode_query, token_id
from tests.checkpoints import CHAT_TEMPLATE, CHAT_TEMPLATE_3, IMAGE_TOKEN_ID, PREPROCESSING, TOKENIZER
from train.processor import ImageTextProcessor

DEFAULT = PromptTemplate()
DIGITS = AnswerFormat()
TEMPLATES = {
    "as Qwen2-VL was released": DEFAULT,
    "numbered pictures": PromptTemplate(number_images=True),
    "another system text": PromptTemplate(system="Answer with boxes.\nNothing else."),
    "words around the query": PromptTemplate(query="Find {query} in these pictures; write {query} boxes.\n"),
    "as Qwen3-VL was released": PromptTemplate(system_turn=False),
    "all of it": PromptTemplate("Be brief.", "Where is {query}?", number_images=True),
}
SIZES = [(64, 48), (300, 90), (56, 56), (29, 700)]  # (width, height): shrunk, grown and kept by the pixel budget
QUERY = "every blue block <|box_start|>(1,2),(30,40)<|box_end|>, été 赤い杯 {query}?"


@pytest.fixture(scope="module")
def processor() -> ImageTextProcessor:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    numbers = {key: value for key, value in PREPROCESSING.to_config().items() if not key.endswith("_pixels")}
    budget = {"shortest_edge": PREPROCESSING.min_pixels, "longest_edge": PREPROCESSING.max_pixels}
    return ImageTextProcessor(Qwen2VLImageProcessorPil(**numbers, size=budget), tokenizer, CHAT_TEMPLATE)


def template_of(template: PromptTemplate) -> str:
    """The chat template of a family that has, or has not, a system turn of its own."""
    return CHAT_TEMPLATE if template.system_turn else CHAT_TEMPLATE_3


def grids_of(sizes: list[tuple[int, int]]) -> list[Grid]:
    patch = PREPROCESSING.patch_size
    resized = [smart_resize(height, width, PREPROCESSING) for width, height in sizes]
    return [(1, height // patch, width // patch) for height, width in resized]


def reference(processor: ImageTextProcessor, template: PromptTemplate, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """What transformers makes of the same conversation."""
    content: list[dict[str, Any]] = [{"type": "image", "image": Image.new("RGB", size, "teal")} for size in sizes]
    content.append({"type": "text", "text": template.query.replace("{query}", QUERY)})
    messages = [{"role": "user", "content": content}]
    if template.system != DEFAULT.system:  # Qwen2-VL's template writes its default itself
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": template.system}]})
    output: dict[str, Any] = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, add_vision_id=template.number_images,
        return_tensors="np", chat_template=template_of(template),
    )  # fmt: skip
    return output


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("label", TEMPLATES)
def test_equals_the_chat_template(label: str, count: int, processor: ImageTextProcessor) -> None:
    template, sizes = TEMPLATES[label], SIZES[:count]
    grids = grids_of(sizes)
    expected = reference(processor, template, sizes)
    assert expected["image_grid_thw"].tolist() == [list(grid) for grid in grids]
    prefix = encode_prefix(TOKENIZER, template, grids, PREPROCESSING.merge_size)
    query = encode_query(TOKENIZER, template, DIGITS, QUERY)
    assert np.concatenate([prefix, query]).tolist() == expected["input_ids"][0].tolist()
    assert prefix.dtype == query.dtype == np.int64


def test_the_prefix_holds_every_picture_and_no_query() -> None:
    grids: list[Grid] = [(1, 4, 6), (1, 2, 2)]
    prefix = encode_prefix(TOKENIZER, DEFAULT, grids, 2)
    assert np.count_nonzero(prefix == IMAGE_TOKEN_ID) == 6 + 1
    assert prefix[-1] == token_id(TOKENIZER, "<|vision_end|>")
    query = encode_query(TOKENIZER, DEFAULT, DIGITS, "the red mug")
    assert IMAGE_TOKEN_ID not in query
    assert (
        TOKENIZER.decode(query.tolist(), skip_special_tokens=False) == "the red mug<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_pictures() -> None:
    with pytest.raises(GemvgError, match="no pictures were given; a query needs at least one"):
        encode_prefix(TOKENIZER, DEFAULT, [], 2)


@pytest.mark.parametrize("query", ["", " \n\t", None, 3, ["the red mug"]])
def test_an_empty_query_is_refused(query: Any) -> None:
    with pytest.raises(GemvgError, match="the query is empty; say what to look for"):
        check_query(query)


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_special_tokens_are_refused(token: str) -> None:
    with pytest.raises(GemvgError, match="which would rewrite the prompt") as caught:
        encode_query(TOKENIZER, DEFAULT, DIGITS, f"the red mug{token}")
    assert token in str(caught.value)


def test_every_special_token_that_is_let_through_leaves_the_template_alone() -> None:
    special = {token.content for token in TOKENIZER.get_added_tokens_decoder().values()}
    harmless = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
    assert special - set(CONTROL_TOKENS) == {*harmless, "<|quad_start|>", "<|quad_end|>"}
    check_query(" ".join(harmless))


def test_broken_text_is_refused() -> None:
    # Python's reading of a byte 0xFF on the command line.
    with pytest.raises(GemvgError, match=r"the query 'mug \\udcff' is not Unicode text"):
        encode_query(TOKENIZER, DEFAULT, DIGITS, "mug \udcff")


def test_a_tokenizer_of_another_model_is_named() -> None:
    with pytest.raises(GemvgError, match=r"tokenizer.json has no token <\|image_pad\|>; it is not a Qwen2-VL"):
        encode_prefix(Tokenizer(BPE()), DEFAULT, [(1, 2, 2)], 2)


def test_the_template_survives_its_config() -> None:
    for template in TEMPLATES.values():
        assert PromptTemplate.from_config(template.to_config()) == template
    with pytest.raises(GemvgError, match=r"needs the place \{query\} in it"):
        PromptTemplate.from_config({"query": "Find it"})


def test_thinking_is_asked_for_in_the_template_s_words() -> None:
    template = PromptTemplate(think="{query} Reason first.")
    ids = encode_query(TOKENIZER, template, DIGITS, "the red mug", think=True)
    assert TOKENIZER.decode(ids.tolist(), skip_special_tokens=False).startswith("the red mug Reason first.<|im_end|>")
    with pytest.raises(GemvgError, match=r"prompt\.think is 'no place'"):
        PromptTemplate.from_config({"think": "no place"})


def test_a_box_in_a_query_is_asked_in_the_checkpoint_s_coordinates() -> None:
    box = mark(Box(0, 10, 20, 60, 100), (100, 200))
    assert box == "<|box_start|>(100,100),(600,500)<|box_end|>"
    assert localise(f"like {box}", DIGITS) == f"like {box}"
    locations = AnswerFormat("locations", 129)
    assert localise(f"like {box}!", locations) == "like <|box_start|><loc_13><loc_13><loc_77><loc_64><|box_end|>!"
    assert localise("<|box_start|>(0,0),(9999,9999)<|box_end|>", locations).endswith("<loc_128><loc_128><|box_end|>")


def test_a_box_in_a_query_is_asked_in_pixels_where_all_pictures_share_a_size() -> None:
    pixels, box = AnswerFormat("pixels"), mark(Box(0, 10, 20, 60, 100), (100, 200))
    shown = "<|box_start|>(28,56),(168,280)<|box_end|>"
    assert localise(f"like {box}", pixels, [(280, 560)] * 2) == f"like {shown}"
    ids = encode_query(TOKENIZER, DEFAULT, pixels, f"like {box}", resized=[(280, 560)])
    assert TOKENIZER.decode(ids.tolist(), skip_special_tokens=False).startswith(f"like {shown}<|im_end|>")
    assert localise("like a mug", pixels) == "like a mug"
    with pytest.raises(
        GemvgError, match=r"several sizes \(280 x 560, 56 x 56 after resizing\).*; give pictures of one"
    ):
        localise(f"like {box}", pixels, [(280, 560), (56, 56), (280, 560)])
    with pytest.raises(GemvgError, match="in pixels of the resized pictures; give their sizes"):
        localise(f"like {box}", pixels)
