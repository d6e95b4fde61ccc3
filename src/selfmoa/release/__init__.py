"""What leaves a run: policies with their cards, merged models, pairs, and a push to a model hub.

Every folder that is written here holds `README.md`, a card for people, and `selfmoa.json`, the
receipt from which the card was written and by which the folder can be checked.
"""

RECEIPT, CARD = "selfmoa.json", "README.md"
ADAPTER, MODEL, PAIRS = "adapter", "model", "pairs"
"""The kinds of folder."""
