"Laws of floor 0, for any grid, patch and permutation: hypothesis looks for the one that breaks them."
import math, torch
import torch.nn.functional as F
from hypothesis import assume, given, strategies as st
from torch.testing import assert_close

from relvit.patches import (from_patches, grid_of, inverse_perms, mega_patches, permute, positions, random_borders,
                            random_perms, resample_matrix, to_patches)
from relvit.relations import (RELATIONS, absolute_positions, angles, directions, distances, flat_index, relation_counts,
                              spatial_relations)

near = dict(atol=2e-6, rtol=0)
ulp = dict(atol=3e-7, rtol=0) # of float32 at pi: atan2 rounds differently in a vector and in its tail
side = st.integers(1, 16)
grids = st.tuples(side, side)
seeds = st.integers(0, 2**31)
squares = side.map(lambda n: (n, n)) | st.sampled_from([(1, 1), (1, 2), (1, 16), (16, 1), (2, 16), (7, 7), (8, 8)])
shapes = grids | squares # rectangles and the grids that are trained on
patch_sides = st.tuples(st.integers(1, 5), st.integers(1, 5))


def gen(seed): return torch.Generator().manual_seed(seed)


def images(b, size, seed, uint8, c=3):
    "A batch of noise, uint8 or float in [0,1]"
    x = torch.randint(0, 256, (b, c, *size), generator=gen(seed), dtype=torch.uint8)
    return x if uint8 else x.float()/255 + torch.rand(x.shape, generator=gen(seed + 1))/256


@st.composite
def batches(draw, largest=6):
    "(images, p, grid) of small batches"
    h, w = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    ph, pw = draw(patch_sides)
    x = images(draw(st.integers(1, 3)), (h*ph, w*pw), draw(seeds), draw(st.booleans()), draw(st.sampled_from([1, 3])))
    return x, draw(st.sampled_from([(ph, pw), [ph, pw]])) if ph != pw else ph, (h, w)


def places(grid): return [(i % grid[1], i//grid[1]) for i in range(grid[0]*grid[1])]


def by_hand(grid, f):
    "The (n,n) matrix of f(column i, row i, column j, row j), in double precision, one pair after the other"
    return torch.tensor([[f(*a, *b) for b in places(grid)] for a in places(grid)], dtype=torch.float64)


def off_diagonal(m): return m[..., ~torch.eye(m.shape[-1], dtype=torch.bool)]


# patches

@given(batches())
def test_cutting_and_joining_changes_nothing(batch):
    x, p, grid = batch
    patches = to_patches(x, p)
    assert grid_of(x, p) == grid and patches.dtype == x.dtype
    assert torch.equal(from_patches(patches, grid), x)


@given(batches(), st.data())
def test_patch_i_is_row_and_column_of_i(batch, data):
    x, p, (h, w) = batch
    ph, pw = (p, p) if isinstance(p, int) else p
    i = data.draw(st.integers(0, h*w - 1))
    row, col = i//w*ph, i % w*pw
    assert torch.equal(to_patches(x, p)[:, i], x[:, :, row:row+ph, col:col+pw])


@given(side, st.integers(2, 9), st.integers(1, 8), st.booleans())
def test_a_side_that_p_does_not_divide_is_an_error(n, p, rest, rows):
    assume(rest % p)
    size = (n*p + rest, n*p) if rows else (n*p, n*p + rest)
    for f in to_patches, lambda x, p: permute(x, torch.arange(n*n)[None], p), lambda x, p: mega_patches(x, p, 1):
        try: f(torch.zeros(1, 1, *size), p)
        except ValueError as e: assert str(p) in str(e) and str(n*p + rest) in str(e)
        else: raise AssertionError(f'{size} was cut into patches of {p}')


@given(batches(), seeds)
def test_slot_a_shows_patch_perm_a(batch, seed):
    x, p, (h, w) = batch
    perms = random_perms(len(x), h*w, gen(seed))
    shuffled, before = to_patches(permute(x, perms, p), p), to_patches(x, p)
    for b in range(len(x)):
        assert sorted(perms[b].tolist()) == list(range(h*w))
        for a in range(h*w): assert torch.equal(shuffled[b, a], before[b, perms[b, a]])


@given(batches(), seeds)
def test_permutations_undo_and_compose(batch, seed):
    x, p, (h, w) = batch
    perms, then = random_perms(len(x), h*w, gen(seed)), random_perms(len(x), h*w, gen(seed + 1))
    assert torch.equal(permute(permute(x, perms, p), inverse_perms(perms), p), x)
    assert torch.equal(perms.gather(1, inverse_perms(perms)), torch.arange(h*w).expand(len(x), -1))
    assert torch.equal(permute(permute(x, perms, p), then, p), permute(x, perms.gather(1, then), p))
    assert torch.equal(permute(x, perms[0], p), permute(x, perms[:1].expand(len(x), -1), p)) # one for all


@given(shapes, seeds)
def test_positions_follow_the_permutation(grid, seed):
    perms, pos = random_perms(3, grid[0]*grid[1], gen(seed)), positions(grid)
    assert pos.tolist() == [list(xy) for xy in places(grid)]
    assert torch.equal(positions(grid, perms), pos[perms])
    assert torch.equal(flat_index(positions(grid, perms), grid), perms)
    assert torch.equal(absolute_positions(grid, perms), perms)
    assert absolute_positions(grid).tolist() == list(range(len(pos)))


def test_permutations_are_uniform():
    "All 24 orders of four patches, each about 1000 times (standard deviation 31)"
    counts = random_perms(24000, 4, gen(0)).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24 and (counts - 1000).abs().max() < 5*31


# relations

@given(shapes)
def test_relations_and_distances_by_hand(grid):
    sign = lambda v: (v > 0) - (v < 0)
    pos, longest = positions(grid), math.hypot(grid[0] - 1, grid[1] - 1)
    R = by_hand(grid, lambda xi, yi, xj, yj: 3*(sign(yi - yj) + 1) + sign(xi - xj) + 1)
    d = by_hand(grid, lambda xi, yi, xj, yj: math.sqrt((xi - xj)**2 + (yi - yj)**2))
    assert torch.equal(spatial_relations(pos), R.long())
    assert_close(distances(pos, normalise=False).double(), d, **near)
    assert_close(distances(pos).double(), d/longest*2 - 1 if longest else d - 1, **near)


@given(shapes, st.floats(.01, 1))
def test_relations_of_places_that_are_no_whole_numbers(grid, unit):
    "Only the order of the coordinates counts, however close they lie"
    assert torch.equal(spatial_relations(positions(grid)*unit), spatial_relations(positions(grid)))


@given(shapes)
def test_angles_and_directions_by_hand(grid):
    h, w = grid

    def angle(xi, yi, xj, yj):
        if (xi, yi) == (xj, yj): return 0
        a, b, c, d = xi + w/2, yi + h/2, xj + w/2, yj + h/2
        return math.acos((a*c + b*d)/(math.hypot(a, b)*math.hypot(c, d) + 1e-4))

    a, pos = by_hand(grid, angle), positions(grid)
    assert_close(angles(pos, normalise=False).double(), a, **near)
    assert_close(angles(pos).double(), a/a.max()*2 - 1 if h*w > 1 else a - 1, **near)
    bearing = by_hand(grid, lambda xi, yi, xj, yj: math.atan2(yj - yi, xj - xi))
    assert_close(directions(pos).double(), bearing, **near)


@given(shapes, seeds)
def test_matrices_permute_with_the_patches(grid, seed):
    perms, pos = random_perms(2, grid[0]*grid[1], gen(seed)), positions(grid)
    for f in spatial_relations, distances, angles, directions:
        m, batch = f(pos), f(positions(grid, perms))
        for perm, got in zip(perms, batch):
            assert_close(got, m[perm][:, perm], **ulp)
            assert_close(got, f(positions(grid, perm)), **ulp) # a batch is its images


@given(shapes, st.data())
def test_some_of_the_patches_with_their_grid(grid, data):
    "What is left after dropping patches keeps the scale of the whole grid, if the grid is said"
    n = grid[0]*grid[1]
    some = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9, unique=True)))
    pos = positions(grid)
    for f in distances, angles: assert_close(f(pos[some], grid=grid), f(pos)[some][:, some], **ulp)


@given(shapes)
def test_laws_of_the_matrices(grid):
    pos, n = positions(grid), grid[0]*grid[1]
    R, D, A, B = (f(pos) for f in (spatial_relations, distances, angles, directions))
    assert R.dtype == torch.int64 and D.dtype == A.dtype == B.dtype == torch.float32
    assert (R + R.T == 8).all() and (R.diagonal() == RELATIONS.index('CC')).all()
    for m in D, A:
        assert torch.equal(m, m.T) and (m.diagonal() == -1).all()
        assert m.isfinite().all() and m.min() >= -1 and m.max() <= 1
        if n > 1: assert m.max() > 1 - 1e-6 and off_diagonal(m).min() > -1
    assert B.isfinite().all() and B.max() <= torch.tensor(math.pi) and B.min() > -torch.tensor(math.pi)
    assert (B.diagonal() == 0).all()
    turn = off_diagonal(B - B.T).abs()
    assert_close(turn, torch.full_like(turn, math.pi), **near)
    assert torch.equal(relation_counts(grid), R.flatten().bincount(minlength=9))


@given(shapes)
def test_directions_round_to_relations(grid):
    "Where j lies seen from i has the signs of the direction's cosine (columns) and sine (rows)"
    pos = positions(grid)
    R, B = spatial_relations(pos).T, directions(pos)
    sign = lambda v: torch.where(v.abs() < 1e-6, 0, v.sign())
    assert torch.equal(off_diagonal(R % 3 - 1), off_diagonal(sign(B.cos())).long())
    assert torch.equal(off_diagonal(R//3 - 1), off_diagonal(sign(B.sin())).long())


@given(shapes)
def test_distances_obey_the_triangle_inequality(grid):
    d = distances(positions(grid), normalise=False)
    assert (d[:, None] <= d[:, :, None] + d.T[None] + 1e-5).all() # d[i,k] <= d[i,j] + d[j,k]


# mega-patches

@given(side, st.data(), seeds)
def test_borders_cut_into_whole_cells(n, data, seed):
    cells = data.draw(st.integers(1, n))
    borders = random_borders(5, n, cells, gen(seed))
    assert borders.shape == (5, cells + 1) and borders.dtype == torch.int64
    assert (borders[:, 0] == 0).all() and (borders[:, -1] == n).all() and (borders.diff() >= 1).all()
    for wrong in 0, n + 1:
        try: random_borders(1, n, wrong)
        except ValueError as e: assert str(n) in str(e) and str(wrong) in str(e)
        else: raise AssertionError(f'{n} patches were cut into {wrong} cells')


def test_borders_are_uniform():
    "All 15 ways to cut 7 patches into 5 cells, each about 1000 times (standard deviation 31)"
    counts = random_borders(15000, 7, 5, gen(0)).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 15 and (counts - 1000).abs().max() < 5*31


@given(st.integers(1, 40), st.data(), st.booleans())
def test_resampling_weights_stay_inside_their_segment(size, data, antialias):
    start = data.draw(st.integers(0, size - 1))
    length, out = data.draw(st.integers(1, size - start)), data.draw(st.integers(1, 40))
    w = resample_matrix(torch.tensor(start), torch.tensor(length), out, size, antialias)
    inside = (torch.arange(size) >= start) & (torch.arange(size) < start + length)
    assert w.shape == (out, size) and (w >= 0).all() and (w[:, ~inside] == 0).all()
    assert_close(w.sum(-1), torch.ones(out), **near)


@given(batches(), seeds)
def test_as_many_mega_patches_as_patches_is_the_image(batch, seed):
    x, p, grid = batch
    assert_close(mega_patches(x, p, grid, gen(seed)), x, atol=1e-6*x.is_floating_point(), rtol=0)


@st.composite
def cuts(draw):
    "(images, p, side, seed) where the image can be cut into that many cells"
    x, p, grid = draw(batches())
    return x, p, tuple(draw(st.integers(1, n)) for n in grid), draw(seeds)


@given(cuts(), st.booleans())
def test_mega_patches_of_a_batch_are_those_of_each_image(cut, antialias):
    x, p, sides, seed = cut
    borders = [random_borders(len(x), n, s, gen(seed)) for n, s in zip(grid_of(x, p), sides)]
    mega = mega_patches(x, p, sides, borders=borders, antialias=antialias)
    assert mega.dtype == x.dtype
    for b in range(len(x)):
        one = mega_patches(x[b:b+1], p, sides, borders=[edge[b:b+1] for edge in borders], antialias=antialias)
        assert_close(mega[b:b+1], one, atol=1e-6 if x.is_floating_point() else 1, rtol=0)


@given(cuts(), st.booleans())
def test_each_mega_patch_is_its_cell_resized(cut, antialias):
    x, p, sides, seed = cut
    ph, pw = (p, p) if isinstance(p, int) else p
    rows, cols = borders = [random_borders(len(x), n, s, gen(seed)) for n, s in zip(grid_of(x, p), sides)]
    mega = mega_patches(x, p, sides, borders=borders, antialias=antialias)
    for b, i, j in {(0, 0, 0), (len(x) - 1, sides[0] - 1, sides[1] - 1), (0, sides[0]//2, sides[1]//2)}:
        cell = x[b:b+1, :, rows[b, i]*ph:rows[b, i+1]*ph, cols[b, j]*pw:cols[b, j+1]*pw].float()
        resize = lambda x, *size: F.interpolate(x.contiguous(), size, mode='bilinear', antialias=antialias)[0]
        # torch 2.14 antialiases what is one pixel wide wrongly, every row becomes the first; on its side it is right
        want = resize(cell, ph, pw) if pw > 1 else resize(cell.mT, pw, ph).mT
        got = mega[b, :, i*ph:i*ph+ph, j*pw:j*pw+pw].float()
        assert_close(got, want, atol=1e-5 if x.is_floating_point() else .501, rtol=0) # uint8 rounds


@given(cuts())
def test_the_same_generator_cuts_the_same(cut):
    x, p, sides, seed = cut
    again = [mega_patches(x, p, sides, gen(seed)) for _ in range(2)]
    assert torch.equal(*again)


@given(st.integers(5, 9), seeds)
def test_rows_and_columns_are_cut_apart_unless_told(n, seed):
    "Channel 0 rises with the column, channel 1 with the row: cut alike, one is the other turned"
    ramp = torch.arange(4.*n).expand(1, 4*n, -1)
    x = torch.stack([ramp, ramp.mT], 1).expand(32, -1, -1, -1)
    alike = lambda m: (m[:, 0] - m[:, 1].mT).abs().amax((1, 2)) < 1e-3
    assert alike(mega_patches(x, 4, n//2, gen(seed), same_cuts=True)).all()
    apart = mega_patches(x, 4, n//2, gen(seed))
    assert not alike(apart).all() and alike(apart).float().mean() < .6
    assert (apart[:, 0, 0] - apart[:1, 0, 0]).abs().amax(1).max() > 1 # and images apart from each other


@given(st.integers(2, 6), st.integers(2, 6), seeds)
def test_same_cuts_need_a_square(h, w, seed):
    assume(h != w)
    for size, sides in ((h, w), 2), ((h, h), (2, 1)):
        try: mega_patches(torch.zeros(1, 1, 2*size[0], 2*size[1]), 2, sides, gen(seed), same_cuts=True)
        except ValueError as e: assert 'square' in str(e)
        else: raise AssertionError(f'{size} was cut alike into {sides}')
