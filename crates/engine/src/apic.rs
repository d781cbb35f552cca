//! Local APICs and the messages between them.
