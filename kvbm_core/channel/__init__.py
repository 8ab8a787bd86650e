"""Leader↔worker messages where the engine carries none: ZMQ, ipc on one node, tcp across nodes.

    messages, stream, leader_protocol, worker_protocol     decisions: no socket, no clock, no thread
    loop, leader_end, worker_end, rendezvous               effects

Invariant: a report is applied exactly once and in order, or its rank is lost; never neither.
"""
