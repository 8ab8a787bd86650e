from collections.abc import Buffer  # type: ignore[attr-defined]

def copy_blocks(
    planes: Buffer,
    host_address: int,
    host_block_bytes: int,
    num_device_blocks: int,
    num_host_blocks: int,
    device_ids: Buffer,
    host_ids: Buffer,
    to_host: bool,
    /,
) -> None: ...
