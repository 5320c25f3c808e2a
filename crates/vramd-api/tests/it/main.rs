mod golden;
mod golden_worker;
