"""The recording proxy: any agent that speaks OpenAI's API or Anthropic's plays through it, and every call is on disk
before the answer goes out.

Read it in this order: ``shapes.py`` and ``anthropic.py`` (requests in, answers out), ``history.py`` (which
conversation a request continues), ``conversation.py`` (its branches and its journal), ``room.py`` (all conversations of
one tenant), ``upstream.py`` (the engine), ``feedback.py`` (what is said later), ``server.py`` (HTTP).
"""
