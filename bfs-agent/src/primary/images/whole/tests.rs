//! Sets of images that stand on others, made up, and what they are when they stand alone.

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

/// What a generated set has of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// Nothing: it was never touched.
    None,
    /// Its bytes.
    Own,
    /// What the set below has.
    Below,
}

const WHOLE: &str = "whole-1";
const HEAD: [u8; 2] = [0x08, 3];

fn page() -> usize {
    crate::primary::capture::page_size()
}

/// Writes one layer of a set: `pagemap-7.img` and `pages-3.img`; its pages are of bytes that tell layer and place.
fn write(set: &Path, layer: usize, pages: &[Page], old: bool) {
    let (mut image, mut bytes, mut at) = (b"magicmag".to_vec(), Vec::new(), 0);
    put_entry(&mut image, &HEAD).unwrap();
    while at < pages.len() {
        let kind = pages[at];
        let length = pages[at..].iter().take_while(|page| **page == kind).count();
        let mut run = Vec::new();
        for (field, value) in [(VADDR, at * page()), (NR_PAGES_32, length)] {
            put_varint(&mut run, field << 3);
            put_varint(&mut run, value as u64);
        }
        let flags = if kind == Page::Below { PE_PARENT } else { PE_PRESENT };
        match (kind, old) {
            (Page::Below, true) => run.extend([(IN_PARENT << 3) as u8, 1]),
            (_, true) => {}
            (_, false) => run.extend([(FLAGS << 3) as u8, flags as u8]),
        }
        if kind != Page::None {
            put_entry(&mut image, &run).unwrap();
        }
        if kind == Page::Own {
            bytes.extend((at..at + length).flat_map(|at| vec![content(layer, at); page()]));
        }
        at += length;
    }
    fs::write(set.join("pagemap-7.img"), image).unwrap();
    fs::write(set.join("pages-3.img"), bytes).unwrap();
}

fn content(layer: usize, at: usize) -> u8 {
    (layer * 50 + at) as u8
}

/// The first layer has some pages; each further one keeps, changes, frees or adds.
fn layers() -> impl Strategy<Value = Vec<Vec<Page>>> {
    (1..5_usize, 1..40_usize).prop_flat_map(|(layers, pages)| {
        let choices = proptest::collection::vec(proptest::collection::vec(0..4_u8, pages), layers);
        choices.prop_map(|choices| {
            let mut there = vec![false; choices[0].len()];
            let layer = |choices: Vec<u8>| {
                let page = |(at, choice): (usize, u8)| {
                    let page = match choice {
                        0 => Page::None,
                        1 => Page::Own,
                        _ if there[at] => Page::Below,
                        _ => Page::Own,
                    };
                    there[at] = page != Page::None;
                    page
                };
                choices.into_iter().enumerate().map(page).collect()
            };
            choices.into_iter().map(layer).collect()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]
    #[test]
    fn what_stands_on_others_stands_alone_with_the_same_pages(layers in layers(), old: bool) {
        let dir = tempfile::tempdir().unwrap();
        let sets: Vec<_> = (0..layers.len()).map(|layer| dir.path().join(layer.to_string())).collect();
        for (layer, pages) in layers.iter().enumerate() {
            fs::create_dir(&sets[layer]).unwrap();
            write(&sets[layer], layer, pages, old);
            if layer > 0 {
                symlink(format!("../{}", layer - 1), sets[layer].join(PARENT)).unwrap();
            }
        }
        let set = sets.last().unwrap();
        make(set, WHOLE).unwrap();
        let last = layers.last().unwrap();
        prop_assert_eq!(set.join(WHOLE).join("pagemap-7.img").exists(), last.contains(&Page::Below));
        let image_of = fs::read(image(set, WHOLE, "pagemap-7.img")).unwrap();
        let map = Map::parse(&image_of, page() as u64).unwrap();
        prop_assert!(!map.has_parent());
        let bytes = fs::read(image(set, WHOLE, "pages-3.img")).unwrap();
        let mut found = vec![None; last.len()];
        for run in &map.runs {
            for n in 0..run.length as usize / page() {
                let at = run.offset as usize + n * page();
                let one = &bytes[at..at + page()];
                prop_assert!(one.iter().all(|byte| *byte == one[0]));
                found[run.at as usize / page() + n] = Some(one[0]);
            }
        }
        let newest = |at: usize| {
            let own = (0..layers.len()).rev().find(|layer| layers[*layer][at] == Page::Own);
            (last[at] != Page::None).then(|| content(own.unwrap(), at))
        };
        prop_assert_eq!(found, (0..last.len()).map(newest).collect::<Vec<_>>());
        forget(set, WHOLE).unwrap();
        prop_assert_eq!(image(set, WHOLE, "pages-3.img"), set.join("pages-3.img"));
    }
}

#[test]
fn a_page_that_no_round_has_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("ahead-1");
    fs::create_dir(&below).unwrap();
    write(&below, 0, &[Page::Own, Page::None], false);
    write(dir.path(), 1, &[Page::Below, Page::Below], false);
    symlink("ahead-1", dir.path().join(PARENT)).unwrap();
    let said = make(dir.path(), WHOLE).unwrap_err().to_string();
    assert!(said.contains("is in no round"), "{said}");
}

#[test]
fn what_is_no_image_is_not_understood() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("ahead-1")).unwrap();
    symlink("ahead-1", dir.path().join(PARENT)).unwrap();
    fs::write(dir.path().join("pagemap-7.img"), b"magicmag\x05\0\0\0abc").unwrap();
    assert!(make(dir.path(), WHOLE).unwrap_err().to_string().contains("is not understood"));
}
