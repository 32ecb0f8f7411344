"""Twenty varied prompts for the default model: short, long, unicode, code, chat."""

_STORY = (
    "The lighthouse keeper counted the ships that passed each night and wrote their names in a ledger. "
    "On the third of March a ship without a name went by, its lamps unlit, and he left the line empty. "
)
_CODE = '''def merge(left, right):
    """Merge two sorted lists."""
    result = []
    while left and right:
'''


def _chat(*turns):
    text = ""
    for role, content in turns:
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


PROMPTS = [
    "A",
    "The capital of France is",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time",
    "In 1969, humans first landed on the",
    "Ο ήλιος και η θάλασσα",
    "日本の首都は東京です。",
    "Ça va? Très bien, merci. L'été dernier, nous",
    "emoji: 🙂🙃 and a zero-width joiner: 👩‍🚀",
    "naïve café — “quotes” … and\ttabs\nand\n\nnewlines",
    _CODE,
    "SELECT name, COUNT(*) FROM orders WHERE",
    '{"name": "octavo", "version": "0.1.0", "dependencies": {',
    "#include <stdio.h>\n\nint main(void) {\n",
    "x^2 + 2x + 1 = (x + 1)^2, so x^2 + 4x + 4 =",
    _STORY * 4,
    _STORY * 12 + "What the keeper did next was",
    _chat(("system", "You are a helpful assistant."), ("user", "What is 2+2?")),
    _chat(("user", "Name three colours."), ("assistant", "Red, green, blue."), ("user", "And two more?")),
    _chat(("user", "Summarise: " + _STORY * 6)),
]
