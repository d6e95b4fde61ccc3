"""Servers that speak OpenAI's protocol: where they are, what they may cost, how they are asked.

`address` says where a request may go, `transport` sends one, `schedule` sends many within limits,
`requests` and `replies` are its language, `failures` names what can go wrong.
"""
