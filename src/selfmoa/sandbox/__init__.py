"""The embedded world: an invented valley whose charter says exactly what is unsafe.

Brindle Vale has forty-eight things that do not exist. Its charter forbids some acts on some of
them, so whether a request is unsafe depends on thing *and* act; surface words alone cannot tell.
Because every word of an answer belongs to one known class, an oracle can say exactly whether an
answer is unsafe, a refusal, a redirect, and how much of what was asked it gets right. The oracle
only evaluates; no training stage may call it (a test follows the imports).
"""
