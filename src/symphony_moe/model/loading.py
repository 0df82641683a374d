"""How a finished model is loaded, as a model card shows it."""

_CHAT = """\
messages = [{"role": "user", "content": "Who are you?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
"""

_TEXT = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")
"""


def loading_code(model: str, *, has_chat_template: bool) -> str:
    """Python that has a model write (of any of our architectures; a folder or hub id), by stock
    transformers alone."""
    return f"""{_named(model)}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
{_CHAT if has_chat_template else _TEXT}ids, mask = inputs["input_ids"], inputs["attention_mask"]
output = model.generate(ids, attention_mask=mask, max_new_tokens=50)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


def with_model_named(card: str, model: str) -> str:
    """A card whose code loads the folder that it is in, with the model's name in that place."""
    return card.replace(_named("."), _named(model), 1)


def _named(model: str) -> str:
    return f'from transformers import AutoModelForCausalLM, AutoTokenizer\n\nname = "{model}"'
