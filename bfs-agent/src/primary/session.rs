//! One group at work: capture, engine, shipper and control tied together.
