//! From captured events to ordered records: model, resolver, cut, settling.
