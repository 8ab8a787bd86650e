"""A conformance harness for connectors of TensorRT-LLM, which can't be installed here.

It reproduces the executor's order of calls and its rules on data, on the CPU, with a toy model
whose tokens depend on every byte of a request's KV. It is our reading of the public source, not the
engine.

    from tests.contract.trtllm.harness import Connector, check_tokens, run
    from tests.contract.trtllm.llm_request import Request

    connector = Connector("kvbm_connectors.trtllm", "DynamoKVBMConnectorLeader",
                          "DynamoKVBMConnectorWorker")
    waves = [[Request(1, prompt, max_tokens=5)], [Request(2, prompt, max_tokens=5)]]
    outcome = run(connector, waves, "1.2", num_ranks=2, overlap=True, chunk_tokens=8,
                  env={"DYN_KVBM_CPU_CACHE_GB": "1"},
                  llm_args={"kv_cache_config.enable_partial_reuse": True},
                  between_waves=wait_until_saved,   # (rank, scheduler or None, worker), engine idle
                  at_end=read_state)                # kept in outcome.states[rank]
    check_tokens(outcome, waves)                    # raises ConformanceError on a wrong token
    assert outcome.num_matched_tokens               # the second wave came from the connector

Between waves the radix tree is emptied (cold=False keeps it) while the connector lives on. Flavours
are in `modules.FLAVOURS`; further options at `harness.run` and `engine.Setup`; what a request can
ask for (a stop token, a cancel in a phase, a late arrival, a salt) at `llm_request.Request`.
`ranks_as="processes"` starts each rank in a process of its own: hooks must then be functions that
can be imported.

Files: modules, llm_args and mpi stand in for `tensorrt_llm`; pool, model, executor and manager are
the engine; engine brings a rank up; harness runs the ranks; reference is a small connector that
conforms, and mutants are copies of it with one fault each, which the harness must notice.
"""
