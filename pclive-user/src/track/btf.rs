//! Where members lie in the running kernel's structures, from its BTF (`Documentation/bpf/btf.rst`).
//!
//! aya relocates programs that were compiled with CO-RE relocations, which Rust does not emit; so the few offsets that
//! the programs need are looked up here and handed to them when they are loaded.

use std::collections::HashMap;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;

/// Why an offset is not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BtfError {
    /// The kernel was built without `CONFIG_DEBUG_INFO_BTF`, or /sys is not mounted.
    #[error("cannot read {VMLINUX}")]
    Read(#[source] std::io::Error),
    /// The file is no BTF, or one of a version this reader does not know.
    #[error("{VMLINUX} cannot be understood at byte {0}")]
    Malformed(usize),
    /// The structure has no such member: this kernel was built without it.
    #[error("the kernel's struct {structure} has no member {member}")]
    NoMember {
        /// Name of the structure.
        structure: &'static str,
        /// Name of the member.
        member: &'static str,
    },
}

/// The structures and unions of a BTF blob.
pub struct Btf<'a> {
    strings: &'a [u8],
    /// Type id → members (12 bytes each) of a structure or union.
    composites: HashMap<u32, Composite<'a>>,
    by_name: HashMap<&'a [u8], u32>,
}

struct Composite<'a> {
    members: &'a [u8],
    /// Member offsets carry a bit-field size in their upper byte.
    has_bitfields: bool,
}

/// Reads the running kernel's BTF.
pub fn read_vmlinux() -> Result<Vec<u8>, BtfError> {
    std::fs::read(VMLINUX).map_err(BtfError::Read)
}

impl<'a> Btf<'a> {
    /// Finds the structures in a BTF blob.
    pub fn parse(blob: &'a [u8]) -> Result<Self, BtfError> {
        let mut header = Cursor { blob, at: 0 };
        if header.u16()? != MAGIC || header.u16()? & 0xff != 1 {
            return Err(BtfError::Malformed(0));
        }
        let header_len = header.u32()? as usize;
        let mut section = || Ok::<_, BtfError>((header.u32()? as usize, header.u32()? as usize));
        let (types_at, types_len) = section()?;
        let (strings_at, strings_len) = section()?;
        let slice = |at: usize, len: usize| {
            let start = header_len.checked_add(at).ok_or(BtfError::Malformed(4))?;
            let end = start.checked_add(len).ok_or(BtfError::Malformed(4))?;
            blob.get(start..end).ok_or(BtfError::Malformed(4))
        };
        let strings = slice(strings_at, strings_len)?;
        let mut btf = Self { strings, composites: HashMap::new(), by_name: HashMap::new() };
        btf.read_types(slice(types_at, types_len)?)?;
        Ok(btf)
    }

    fn read_types(&mut self, types: &'a [u8]) -> Result<(), BtfError> {
        let mut types = Cursor { blob: types, at: 0 };
        // Id 0 is void and has no record.
        for id in 1.. {
            if types.at == types.blob.len() {
                break;
            }
            let at = types.at;
            let name = types.u32()?;
            let info = types.u32()?;
            types.u32()?;
            let entries = (info & 0xffff) as usize;
            let kind = info >> 24 & 0x1f;
            let rest = types.take(trailing_bytes(kind, entries).ok_or(BtfError::Malformed(at))?)?;
            if matches!(kind, KIND_STRUCT | KIND_UNION) {
                self.composites.insert(id, Composite { members: rest, has_bitfields: info >> 31 == 1 });
                if kind == KIND_STRUCT && name != 0 {
                    self.by_name.insert(self.string(name), id);
                }
            }
        }
        Ok(())
    }

    /// Offset in bytes of `member` in `struct structure`, also through anonymous structures and unions.
    pub fn offset_of(&self, structure: &'static str, member: &'static str) -> Result<u64, BtfError> {
        self.by_name
            .get(structure.as_bytes())
            .and_then(|id| self.offset_in(*id, member.as_bytes(), 8))
            .map(|bits| u64::from(bits / 8))
            .ok_or(BtfError::NoMember { structure, member })
    }

    /// Offset in bits; `depth` bounds what a damaged blob can make this do.
    fn offset_in(&self, id: u32, wanted: &[u8], depth: u32) -> Option<u32> {
        let composite = self.composites.get(&id)?;
        let (members, _) = composite.members.as_chunks::<12>();
        members.iter().find_map(|member| {
            let (words, _) = member.as_chunks::<4>();
            let [name, member_type, offset] = [0, 1, 2].map(|word| u32::from_ne_bytes(words[word]));
            let offset = if composite.has_bitfields { offset & 0x00ff_ffff } else { offset };
            if name != 0 {
                return (self.string(name) == wanted).then_some(offset);
            }
            let inner = self.offset_in(member_type, wanted, depth.checked_sub(1)?)?;
            offset.checked_add(inner)
        })
    }

    fn string(&self, at: u32) -> &'a [u8] {
        let rest = self.strings.get(at as usize..).unwrap_or_default();
        rest.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

/// Bytes that follow a type's common part, by `BTF_KIND_*`.
fn trailing_bytes(kind: u32, entries: usize) -> Option<usize> {
    match kind {
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        2 | 7..=12 | 16 | 18 => Some(0),
        // INT, VAR, DECL_TAG
        1 | 14 | 17 => Some(4),
        // ARRAY
        3 => Some(12),
        // STRUCT, UNION, DATASEC, ENUM64
        4 | 5 | 15 | 19 => Some(12 * entries),
        // ENUM, FUNC_PROTO
        6 | 13 => Some(8 * entries),
        _ => None,
    }
}

struct Cursor<'a> {
    blob: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], BtfError> {
        let taken = self.blob.get(self.at..).and_then(|rest| rest.get(..len));
        self.at += len;
        taken.ok_or(BtfError::Malformed(self.at))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BtfError> {
        let at = self.at;
        self.take(N)?.try_into().map_err(|_| BtfError::Malformed(at))
    }

    fn u16(&mut self) -> Result<u16, BtfError> {
        self.array().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, BtfError> {
        self.array().map(u32::from_ne_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A blob with these types and strings.
    fn blob(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let header = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        let mut blob = MAGIC.to_ne_bytes().to_vec();
        blob.extend([1, 0]);
        blob.extend(header.iter().flat_map(|word| word.to_ne_bytes()));
        blob.extend(types);
        blob.extend(strings);
        blob
    }

    #[test]
    fn members_are_found_through_anonymous_structures_and_bit_fields() {
        let structure = |entries: u32| KIND_STRUCT << 24 | entries;
        #[rustfmt::skip]
        let types = [
            0, 1 << 24, 4, 32,                               // 1: an int
            0, KIND_UNION << 24 | 1, 8, 9, 1, 32,            // 2: union { x: bits 32.. }
            1, structure(3) | 1 << 31, 16,                   // 3: struct mm
            4, 1, 1 << 24,  0, 2, 64,  7, 1, 128,            //    { a: 1-bit field at 0; union at 64; b at 128 }
        ];
        let blob = blob(&types, b"\0mm\0a\0\0b\0x\0");
        let btf = Btf::parse(&blob).unwrap();
        assert_eq!(btf.offset_of("mm", "a").unwrap(), 0);
        assert_eq!(btf.offset_of("mm", "x").unwrap(), 12);
        assert_eq!(btf.offset_of("mm", "b").unwrap(), 16);
        assert!(matches!(btf.offset_of("mm", "c"), Err(BtfError::NoMember { .. })));
        assert!(matches!(btf.offset_of("vma", "a"), Err(BtfError::NoMember { .. })));
    }

    #[test]
    fn a_structure_that_contains_itself_ends() {
        let blob = blob(&[1, KIND_STRUCT << 24 | 1, 8, 0, 1, 0], b"\0mm\0");
        assert!(Btf::parse(&blob).unwrap().offset_of("mm", "a").is_err());
    }

    #[test]
    fn damaged_blobs_are_refused() {
        let good = blob(&[1, KIND_STRUCT << 24 | 1, 8, 0, 1, 0], b"\0mm\0");
        for len in 0..good.len() {
            assert!(Btf::parse(&good[..len]).is_err(), "{len} bytes");
        }
        let mut bad = good;
        bad[0] ^= 1;
        assert!(Btf::parse(&bad).is_err());
    }

    #[test]
    fn the_running_kernel_has_what_the_programs_read() {
        let blob = read_vmlinux().unwrap();
        let btf = Btf::parse(&blob).unwrap();
        // Since the maple tree (6.1) the mm comes right after the two addresses.
        assert_eq!(btf.offset_of("vm_area_struct", "vm_mm").unwrap(), 16);
        assert_eq!(
            btf.offset_of("task_struct", "tgid").unwrap(),
            btf.offset_of("task_struct", "pid").unwrap() + 4
        );
        assert!(btf.offset_of("mm_struct", "owner").unwrap() > 0);
    }
}
