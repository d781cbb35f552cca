//! Instructions that run on the host CPU itself, one at a time, with their operands rewritten.
