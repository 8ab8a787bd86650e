"""Effects: engines that copy blocks between the device and host memory, behind one port."""
