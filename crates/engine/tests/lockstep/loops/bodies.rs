//! Loops: accesses that move within areas, on ways that hang on the round, with events now and then.

use std::fmt::Write;

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, FastFormatter, Instruction, MemoryOperand, Register as R};

use super::{AREAS, EVENT, FUNCTION, LARGE, LOOP_BYTES, LOW, Maker};

/// A loop, and its instructions in words.
pub(super) struct Loop {
    pub code: Vec<u8>,
    pub text: String,
}

/// What a loop's code is put together from.
struct Body {
    items: Vec<(Instruction, Option<usize>)>,
}

impl Body {
    fn put(&mut self, insn: Result<Instruction, iced_x86::IcedError>) {
        if let Ok(insn) = insn {
            self.items.push((insn, None));
        }
    }

    fn jump(&mut self, code: Code, to: usize) -> usize {
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_op0_kind(iced_x86::OpKind::NearBranch64);
        self.items.push((insn, Some(to)));
        self.items.len() - 1
    }

    fn assemble(&self, at: u64) -> Option<Vec<u8>> {
        let mut offsets = vec![at; self.items.len() + 1];
        let mut bytes = Vec::new();
        for _ in 0..2 {
            bytes.clear();
            for (i, (insn, to)) in self.items.iter().enumerate() {
                let here = at + bytes.len() as u64;
                let mut insn = *insn;
                if let Some(to) = to {
                    insn.set_near_branch64(offsets[*to]);
                }
                offsets[i] = here;
                let mut encoder = Encoder::new(64);
                encoder.encode(&insn, here).ok()?;
                bytes.extend(encoder.take_buffer());
            }
            *offsets.last_mut()? = at + bytes.len() as u64;
        }
        (bytes.len() <= LOOP_BYTES).then_some(bytes)
    }
}

const CONDITIONS: [Code; 10] = [
    Code::Je_rel32_64,
    Code::Jne_rel32_64,
    Code::Jb_rel32_64,
    Code::Jae_rel32_64,
    Code::Js_rel32_64,
    Code::Jns_rel32_64,
    Code::Jo_rel32_64,
    Code::Jp_rel32_64,
    Code::Jl_rel32_64,
    Code::Jg_rel32_64,
];

/// Registers that a loop has a use for.
struct Roles {
    /// Where areas begin, the counter, and where the round's accesses are.
    bases: [u32; 2],
    counter: u32,
    at: u32,
    others: Vec<u32>,
    /// One of them is the first page: behind it are descriptor tables.
    first_page: bool,
}

impl Maker<'_> {
    pub(super) fn hot_loop(&mut self, at: u64) -> Loop {
        loop {
            let body = self.body();
            let Some(code) = body.assemble(at) else { continue };
            let mut text = String::new();
            let mut decoder = Decoder::with_ip(64, &code, at, DecoderOptions::NONE);
            let mut formatter = FastFormatter::new();
            while decoder.can_decode() {
                let insn = decoder.decode();
                let mut line = String::new();
                formatter.format(&insn, &mut line);
                let _ = writeln!(text, "    {:#x}  {line}", insn.ip());
            }
            return Loop { code, text };
        }
    }

    fn roles(&mut self) -> Roles {
        // RAX is what functions answer in.
        let mut names: Vec<u32> = (1..16).filter(|r| *r != 4).collect();
        for i in (1..names.len()).rev() {
            names.swap(i, self.random.below(i as u64 + 1) as usize);
        }
        Roles {
            bases: [names[0], names[1]],
            counter: names[2],
            at: names[3],
            others: names[4..10].to_vec(),
            first_page: false,
        }
    }

    fn body(&mut self) -> Body {
        let mut r = self.roles();
        let mut body = Body { items: Vec::new() };
        let wide = |n: u32| R::RAX + n;
        let mut masks = [0u32; 2];
        let mut callable = Vec::new();
        for (base, mask) in r.bases.into_iter().zip(&mut masks) {
            let (area, page) = self.area();
            let start = AREAS[area].start;
            r.first_page |= area == LOW;
            let (from, whole) = match AREAS[area].pages {
                1 if area == LARGE => (start + self.random.below(0x100) * 0x1000, 0x7_f7f8),
                1 => (start, 0x7f8),
                pages => (start + (page << 12), if page <= pages / 2 { 0x37f8 } else { 0x7f8 }),
            };
            if area != LARGE {
                callable.push(base);
            }
            *mask = whole;
            body.put(Instruction::with2(Code::Mov_r64_imm64, wide(base), from));
        }
        let most = if self.random.chance(20) { 400 } else { 60 };
        let rounds = 8 + self.random.below(most) as u32;
        body.put(Instruction::with2(Code::Mov_r32_imm32, R::EAX + r.counter, rounds));
        let head = body.items.len();
        for _ in 0..1 + self.random.below(3) {
            let which = self.random.below(2) as usize;
            // Where in the area this round is.
            let stride = self.random.pick(&[8u32, 16, 24, 64, 0x78, 0x208, 0x808, 0x1008, 0x1808, 0x3018]);
            body.put(Instruction::with3(Code::Imul_r64_rm64_imm32, wide(r.at), wide(r.counter), stride));
            body.put(Instruction::with2(Code::And_rm64_imm32, wide(r.at), masks[which]));
            body.put(Instruction::with2(Code::Add_r64_rm64, wide(r.at), wide(r.bases[which])));
            for _ in 0..1 + self.random.below(5) {
                let skip = self.random.chance(25).then(|| {
                    if self.random.chance(50) {
                        let bits = self.random.pick(&[1u32, 3, 7, 15]);
                        body.put(Instruction::with2(Code::Test_rm32_imm32, R::EAX + r.counter, bits));
                    }
                    let code = self.random.pick(&CONDITIONS);
                    body.jump(code, usize::MAX)
                });
                for _ in 0..1 + self.random.below(3) {
                    self.accesses(&mut body, &r);
                }
                if let Some(skip) = skip {
                    body.items[skip].1 = Some(body.items.len());
                }
            }
        }
        if let (Some(&base), true) = (callable.first(), self.random.chance(40)) {
            self.call_function(&mut body, &r, base);
        }
        if self.random.chance(60) {
            let bits = self.random.pick(&[3u32, 7, 7, 15, 31]);
            body.put(Instruction::with2(Code::Test_rm32_imm32, R::EAX + r.counter, bits));
            let skip = body.jump(Code::Jne_rel32_64, usize::MAX);
            body.put(Instruction::with1(Code::Int_imm8, u32::from(EVENT)));
            body.items[skip].1 = Some(body.items.len());
        }
        body.put(Instruction::with1(Code::Dec_rm64, wide(r.counter)));
        body.jump(Code::Jne_rel32_64, head);
        body.put(Instruction::with2(Code::Cmp_rm64_r64, wide(r.others[0]), wide(r.others[1])));
        let mut ret = Instruction::default();
        ret.set_code(Code::Retnq);
        body.put(Ok(ret));
        body
    }

    /// Changes the function in a page, and calls it now and then.
    fn call_function(&mut self, body: &mut Body, r: &Roles, base: u32) {
        let at = |disp: i64| MemoryOperand::with_base_displ(R::RAX + base, disp);
        if self.random.chance(70) {
            let constant = at(FUNCTION as i64 + 1);
            body.put(match self.random.below(3) {
                0 => Instruction::with1(Code::Inc_rm32, constant),
                1 => Instruction::with2(Code::Mov_rm32_r32, constant, R::EAX + r.counter),
                _ => Instruction::with2(Code::Add_rm32_imm8, constant, 3),
            });
        }
        let bits = self.random.pick(&[1u32, 3, 7, 7, 15]);
        body.put(Instruction::with2(Code::Test_rm32_imm32, R::EAX + r.counter, bits));
        let skip = body.jump(Code::Jne_rel32_64, usize::MAX);
        body.put(Instruction::with2(Code::Lea_r64_m, R::RAX, at(FUNCTION as i64)));
        body.put(Instruction::with1(Code::Call_rm64, R::RAX));
        body.put(Instruction::with2(Code::Add_r64_rm64, R::RAX + r.others[2], R::RAX));
        body.items[skip].1 = Some(body.items.len());
    }

    /// An access or two near each other, or something between.
    fn accesses(&mut self, body: &mut Body, r: &Roles) {
        let random = &mut *self.random;
        let other = R::RAX + random.pick(&r.others);
        let narrow = other.full_register32();
        let disp = match random.below(12) {
            0 | 3 if r.first_page => random.below(0x40) as i64 - 0x20,
            0 => 0xff8 + random.below(8) as i64,
            1 => FUNCTION as i64 + 1,
            2 => -8,
            3 => 0x1000,
            _ => random.below(24) as i64 * 8,
        };
        // The function's constant is changed by whole additions only.
        let near_function = disp == FUNCTION as i64 + 1;
        let base = if near_function || random.chance(25) { random.pick(&r.bases) } else { r.at };
        let place = |disp: i64| MemoryOperand::with_base_displ(R::RAX + base, disp);
        if near_function {
            return body.put(Instruction::with2(Code::Add_rm32_imm8, place(disp), 1));
        }
        match random.below(19) {
            0..3 => body.put(Instruction::with2(Code::Mov_r64_rm64, other, place(disp))),
            3 | 4 => body.put(Instruction::with2(Code::Mov_rm64_r64, place(disp), other)),
            5 => body.put(Instruction::with2(Code::Mov_rm32_r32, place(disp), narrow)),
            6 => body.put(Instruction::with2(Code::Add_r64_rm64, other, place(disp))),
            7 => body.put(Instruction::with2(Code::Add_rm64_r64, place(disp), other)),
            8 => body.put(Instruction::with2(Code::Xor_r32_rm32, narrow, place(disp))),
            9 => body.put(Instruction::with1(Code::Inc_rm32, place(disp))),
            10 => body.put(Instruction::with2(Code::Adc_r64_rm64, other, place(disp))),
            11 => body.put(Instruction::with2(Code::Cmp_rm64_r64, place(disp), other)),
            12 => body.put(Instruction::with2(Code::Movdqu_xmm_xmmm128, R::XMM3, place(disp))),
            13 => body.put(Instruction::with2(Code::Movdqu_xmmm128_xmm, place(disp), R::XMM3)),
            14 => {
                let insn = Instruction::with2(Code::Add_rm32_r32, place(disp), narrow);
                body.put(insn.map(|mut insn| {
                    insn.set_has_lock_prefix(true);
                    insn
                }));
            }
            15 => {
                body.put(Instruction::with1(Code::Push_r64, other));
                body.put(Instruction::with2(Code::Add_r64_rm64, other, place(disp)));
                body.put(Instruction::with1(Code::Pop_r64, R::RAX + random.pick(&r.others)));
            }
            16 => body.put(Instruction::with1(Code::Inc_rm64, other)),
            17 => body.put(Instruction::with2(Code::Add_rm64_imm8, other, random.below(256) as u8 as i8 as i32)),
            _ => {
                body.put(Instruction::with2(Code::Mov_r64_rm64, other, place(disp)));
                body.put(Instruction::with2(Code::Mov_rm64_r64, place(disp + 16), other));
            }
        }
    }
}
