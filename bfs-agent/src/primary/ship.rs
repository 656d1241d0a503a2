//! Sending the stream to its destination.
