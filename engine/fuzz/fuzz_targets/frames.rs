#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fleece_engine::fuzzing::frames(data));
