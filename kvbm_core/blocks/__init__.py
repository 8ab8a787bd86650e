"""The block manager of the library: blocks that a program allocates, fills and looks up itself."""
