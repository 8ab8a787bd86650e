"""Discovery: how the workers of an engine find its leader.

Invariant: needed at start-up only; when the service is gone later, serving goes on.
"""
