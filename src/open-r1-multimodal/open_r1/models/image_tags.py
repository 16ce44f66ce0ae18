"""The special tokens that stand for images in prompts, of each kind of family; a report reads them without torch."""

QWEN_IMAGE_TAGS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SMOLVLM_IMAGE_TAGS = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
)
INTERNVL_IMAGE_TAGS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
IMAGE_TAGS = (*QWEN_IMAGE_TAGS, *SMOLVLM_IMAGE_TAGS, *INTERNVL_IMAGE_TAGS)
