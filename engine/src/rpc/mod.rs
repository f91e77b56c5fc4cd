//! The edge: Cap'n Proto objects on one LocalSet thread, bounded queues behind them.
