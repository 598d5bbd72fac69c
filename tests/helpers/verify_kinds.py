"""Pairs, prediction ~ gold, of the kinds that the grammar of answers reads: SAME ones, and OTHER ones that look alike.

The first OTHER ones are a gold with unfinished or foreign markup, which must not be dropped.
"""

SAME = r"""
x=1,\;y=2 ~ x=1,y=2
x=1,\;y=2 ~ (1,2)
x=1\;\text{or}\;x=2 ~ 1,2
x=1\:\text{or}\:x=2 ~ 1,2
\boxed{\boxed{42}} ~ 42
\Delta p=5 ~ 5
|AB|=1 ~ 1
\frac{NO}{BO}=\frac{2}{3} ~ \frac23
S_{\triangle ABC}=6 ~ 6
S_{\triangle}=6 ~ 6
f(m)=2m+1 ~ f(n)=2n+1
a_m=2m+1 ~ a_n=2n+1
\frac{\pi}{6}+n\pi ~ \frac{\pi}{6}+k\pi
x=\frac{\pi}{6}+n\pi, n\in\mathbb{Z} ~ \frac{\pi}{6}+k\pi
x=2n, n\in\mathbb{Z} ~ x=2k, k\in\mathbb{Z}
(\pm1,0) ~ (1,0),(-1,0)
p=5,q=2;p=7,q=2 ~ (5,2),(7,2)
\operatorname{gcd}(42,42) ~ 42
\gcd(12,18) ~ 6
∛8 ~ 2
-infinity ~ -\infty
C_5^2 ~ 10
A_5^2 ~ 20
\mathrm{C}_5^2 ~ 10
C_{5}^{2} ~ 10
\sum_{k=1}^4 k ~ 10
\prod_{k=1}^{4} k ~ 24
x=y=z=1 ~ x=1,y=1,z=1
x=y=z=1 ~ (1,1,1)
x=y=z=1 ~ 1
\begin{vmatrix}1&2\\3&4\end{vmatrix} ~ -2
\det\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ -2
2\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}2&4\\6&8\end{pmatrix}
\lim_{x\to0}\frac{\sin x}{x} ~ 1
\lim_{n\to\infty}(1+\frac1n)^n ~ e
\lim_{x \to \infty} \frac{2x+1}{x} ~ 2
|x|<2 ~ (-2,2)
|x-1|\le 3 ~ [-2,4]
|x|>2 ~ (-\infty,-2)\cup(2,\infty)
180^\circ-2\alpha ~ 180-2\alpha
-1<2x+1<5 ~ (-1,2)
\frac{v_0^2}{2g}+\frac{h}{3v_0}-\frac{g}{h+v_0^2} ~ \frac{h}{3v_0}+\frac{v_0^2}{2g}-\frac{g}{v_0^2+h}
P(1,2) ~ (1,2)
A\cup B=\{1,2\} ~ \{1,2\}
\mathbb{R}\setminus\{0\} ~ (-\infty,0)\cup(0,\infty)
0.\dot{3} ~ \frac13
7\bmod 3 ~ 1
(0,1)\cup[1,2) ~ (0,2)
two ~ 2
P(A|B)=\frac12 ~ 0.5
f(2)=5 ~ 5
e=\frac12 ~ \frac12
\angle ABC=30^\circ ~ 30^\circ
m\angle A = 30^\circ ~ 30
\sin A=\frac12 ~ \frac12
\cos\angle BAC=\frac12 ~ \frac12
AB:BC=1:2 ~ 1:2
\overline{AB}=5 ~ 5
|\vec{a}|=2 ~ 2
|z|=2 ~ 2
\text{Area}=5 ~ 5
a_{n+1}=2n ~ 2n
E(X)=2 ~ 2
\{x|x>2\} ~ (2,\infty)
\left\{\left.x\right|1<x<2\right\} ~ (1,2)
x>2, x\ne3 ~ (2,3)\cup(3,\infty)
\text{The answer is }5 ~ 5
(-1)^n ~ \cos(n\pi)
n!\cdot(n+1) ~ (n+1)!
\frac{\sqrt 3}2 ~ \frac{\sqrt{3}}{2}
-\frac12 ~ \frac{-1}{2}
10:45 ~ 10:45 a.m.
\begin{cases}x=1\\y=2\end{cases} ~ (1,2)
2^{-1} ~ 0.5
x^2=4 \text{ and } y=1 ~ y=1, x^2=4
12\text{ sq. units} ~ 12
5\text{ ft/s} ~ 5
9.8 m/s^2 ~ 9.8
\mathbf{v} ~ v
\{1\}\cup[2,3] ~ [2,3]\cup\{1\}
x\in\{1,2\} ~ 1,2
[1,2]\cap[2,3] ~ \{2\}
①③ ~ ③①
①③ ~ ①,③
①、③ ~ ①③
60^\circ \text{ or } 120^\circ ~ 120^\circ, 60^\circ
y=\pm\frac{\sqrt3}{3}x ~ y=\frac{\sqrt3}{3}x, y=-\frac{\sqrt3}{3}x
[k\pi-\frac{\pi}{3},k\pi+\frac{\pi}{6}],k\in \mathbb{Z} ~ [k\pi-\frac{\pi}{3},k\pi+\frac{\pi}{6}] (k\in \mathbb{Z})
[n\pi-\frac{\pi}{3},n\pi+\frac{\pi}{6}],n\in \mathbb{Z} ~ [k\pi-\frac{\pi}{3},k\pi+\frac{\pi}{6}] (k\in \mathbb{Z})
x=k\pi(k\in\mathbb{Z}) ~ x=n\pi
18\sqrt{3}cm^2 ~ 18\sqrt3
18\sqrt{3}\;\text{cm}^{2} ~ 18\sqrt3
\{x|-1 < x < 4\} ~ (-1,4)
\{x \in \mathbb{R} \mid x > 1\} ~ (1,\infty)
\{x\mid x\neq 1\} ~ x\ne1
{1,2} ~ \{1,2\}
\frac{33}{100} ~ 33\%
33\% ~ 0.33
x=-1\text{ or }2 ~ -1,2
x_1=1,x_2=2 ~ 1,2
x_1=1, x_2=2 ~ x=1 \text{ or } x=2
S_n=n^2 ~ n^2
S_{n}=n^{2} ~ S_n = n^2
a=1,b=2 ~ (1,2)
a=1, b=2 ~ 1,2
(a,b)=(1,2) ~ a=1,b=2
f(x)=x^2+1 ~ y=x^2+1
f^{-1}(x)=2x ~ 2x
f'(x)=2x ~ 2x
\frac{dy}{dx}=2x ~ 2x
x+2y-3=0 ~ 2x+4y-6=0
y=-\frac12x+\frac32 ~ x+2y-3=0
(x-1)^2+y^2=4 ~ x^2-2x+y^2-3=0
3:4 ~ 3:4
1/2 ~ .5
1.50 ~ 3/2
\frac{-1+\sqrt{5}}{2} ~ \frac{\sqrt5-1}{2}
\sqrt{3}-1 ~ -1+\sqrt{3}
2\sqrt{2}i ~ i\sqrt8
e^{i\pi/3} ~ \frac12+\frac{\sqrt3}{2}i
5 \text{ miles per hour} ~ 5\text{ mph}
\$1,000,000 ~ 1000000
1 million ~ 10^6
2,000 dollars ~ \$2000
(-\infty,1)\cup(1,\infty) ~ x\neq1
\mathbb{R}\backslash\{1\} ~ (-\infty,1)\cup(1,\infty)
x\in\mathbb{R},x\ne1 ~ (-\infty,1)\cup(1,\infty)
x \in (-\infty, 1) \cup (1, \infty) ~ x\ne 1
1 < x \text{ and } x < 2 ~ (1,2)
-2\leq x\leq 3 ~ \{x|-2\le x\le 3\}
2 \geq x > 1 ~ (1,2]
m\le -2\text{ or }m\ge 2 ~ (-\infty,-2]\cup[2,+\infty)
m\ge2\text{ or }m\le-2 ~ |m|\ge2
\text{Yes} ~ yes.
\textbf{yes} ~ Yes
\text{no solution} ~ No solution
\varnothing ~ \{\}
\text{A} ~ A.
\text{A, C} ~ AC
A,C ~ A and C
(A) and (C) ~ AC
\frac{\ln 2}{\ln 3} ~ \log_3 2
\log_{10} 5 ~ \lg 5
\log_{2}{3} ~ \frac{\log 3}{\log 2}
\tan^{-1}(2) ~ \arctan 2
\arctan{2} ~ \arctan(2)
2\cos^2\theta-1 ~ \cos 2\theta
n(n+1)(2n+1)/6 ~ \frac{n(n+1)(2n+1)}{6}
2^{n}-1 ~ 2^n - 1
(-1)^{n+1} ~ -(-1)^n
\frac{n!}{k!(n-k)!} ~ \binom{n}{k}
x^{\frac12} ~ \sqrt{x}
\frac{1}{x^2} ~ x^{-2}
sqrt(2)/2 ~ \frac{\sqrt2}{2}
(1+sqrt(5))/2 ~ \frac{1+\sqrt{5}}{2}
x**2+1 ~ x^2+1
3*x ~ 3x
2*pi*r ~ 2\pi r
\frac{1}{2},\frac{1}{3} ~ 1/3, 1/2
\left\{\frac12,3\right\} ~ \{3,0.5\}
\begin{bmatrix}1&0\\0&1\end{bmatrix} ~ \begin{pmatrix}1&0\\0&1\end{pmatrix}
\left(\begin{array}{cc}1&2\\3&4\end{array}\right) ~ \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{cases} x=1 \\ y=2 \end{cases} ~ x=1,y=2
\left\{\begin{array}{l}x=1\\y=2\end{array}\right. ~ (1,2)
3x^2+2x+C ~ 2x+3x^2+C
\ln|x|+C ~ C+\ln|x|
\frac{1}{3}x^3+C ~ \frac{x^3}{3}+C
10 \text{ minutes} ~ 10\text{ min}
10^{-3}\text{ m} ~ 0.001
1.6 \times 10^{-19}\text{ C} ~ 1.6\times10^{-19}
25^\circ\text{C} ~ 25
45\degree ~ 45^\circ
\frac{\pi}{4}\text{ radians} ~ \frac{\pi}{4}
\text{approximately }5 ~ 5
\text{about } 5 ~ 5
x\approx1.414 ~ 1.414
(x,y,z)=(1,2,3) ~ (1,2,3)
(1,2,3) ~ x=1,y=2,z=3
\vec{v}=(1,2) ~ (1,2)
\overrightarrow{AB}=(1,2) ~ (1,2)
\langle1,2\rangle ~ \begin{pmatrix}1\\2\end{pmatrix}
(0,0)\text{ and }(1,1) ~ (1,1),(0,0)
A(1,2),B(3,4) ~ (1,2),(3,4)
(3,4),(1,2) ~ \{(1,2),(3,4)\}
\text{max}=5 ~ 5
P(X=2)=\frac14 ~ 0.25
\frac{a}{b}=\frac{2}{3} ~ \frac23
\frac{AB}{CD}=\frac{2}{3} ~ \frac23
a:b=2:3 ~ 2:3
abc=6 ~ abc=6
ab+bc=3 ~ bc+ab=3
a^2+b^2 ~ b^2+a^2
x^{2}-y^{2} ~ (x-y)(x+y)
\frac{x}{x+1} ~ 1-\frac{1}{x+1}
\sqrt[3]{x} ~ x^{1/3}
\mathrm{e}^2 ~ e^2
\exp(1) ~ e
|3-5| ~ 2
\left|\frac{-1}{2}\right| ~ 0.5
||x|-1| ~ |1-|x||
7^{th} ~ 7
7\text{th} ~ 7
1st ~ 1
10\text{:}30 ~ 10:30
\text{10:30 AM} ~ 10:30 \text{ a.m.}
\frac{1}{2}\text{ cup} ~ \frac12
5\frac{1}{2}\% ~ 5.5\%
2\text{ feet } ~ 2 ft
\sin 30^\circ ~ \frac12
2\sin 15^\circ\cos 15^\circ ~ \frac12
\cos(\pi/3) ~ \frac12
\text{Tuesday.} ~ tuesday
\text{the parabola} ~ parabola
x\geq0\text{ and }x\neq1 ~ [0,1)\cup(1,\infty)
[0,1)\cup(1,+\infty) ~ x\geq 0,x\neq 1
1\leq a<2 ~ [1,2)
a \in [1,2) ~ 1\le a<2
(2,+\infty) ~ a>2
\{-1\}\cup[0,2] ~ [0,2]\cup\{-1\}
\{0,\pm1\} ~ \{-1,0,1\}
0,\pm 1 ~ -1,0,1
x=0\text{ or }x=\pm1 ~ -1,0,1
x=\frac{-1\pm\sqrt5}{2} ~ \frac{-1+\sqrt5}{2},\frac{-1-\sqrt5}{2}
x=2\pi k, k\in\mathbb{Z} ~ 2k\pi
\{x|x=k\pi,k\in Z\} ~ x=k\pi, k \in \mathbb{Z}
2k\pi+\frac{\pi}{3} ~ \frac{\pi}{3}+2n\pi
\frac{\pi}{6}+\frac{k\pi}{2} ~ \frac{(3n+1)\pi}{6}
12\pi\text{ square units} ~ 12\pi
\boxed{x=5} ~ 5
\text{Answer: } \boxed{5} ~ 5
x = 5\text{ cm} ~ 5
-\infty<x<\infty ~ \mathbb{R}
(-\infty,\infty) ~ \mathbb{R}
\text{all real numbers} ~ \mathbb{R}
2\,000 ~ 2000
1 000 000 ~ 10^6
\frac{22}{7} ~ 3\frac17
\dfrac{\frac{1}{2}}{3} ~ \frac16
1\frac{1}{2}\text{ hours} ~ 1.5
\text{5} ~ 5
\text{(3, 4)} ~ (3,4)
5\cdot10^3 ~ 5000
5 x 10^3 ~ 5000
5×10³ ~ 5000
x² + 1 ~ x^2+1
½ ~ 1/2
−5 ~ -5
3√2 ~ 3\sqrt{2}
√(2)/2 ~ \frac{\sqrt2}{2}
∞ ~ \infty
[2, ∞) ~ [2,\infty)
x ≤ 5 ~ (-\infty,5]
a^{m+n} ~ a^m a^n
2^{-3} ~ \frac18
\frac{1}{\sqrt{x}} ~ x^{-1/2}
\sqrt{50} ~ 5\sqrt2
\sqrt{\frac12} ~ \frac{\sqrt2}{2}
\frac{\sqrt{6}}{\sqrt{2}} ~ \sqrt{3}
f(x)=2x ~ f(t)=2t
\sqrt 2 \cdot \sqrt 3 ~ \sqrt 6
5 + -3 ~ 2
x^2<4 ~ (-2,2)
x^2-3x+2\ge 0 ~ (-\infty,1]\cup[2,\infty)
x>a ~ (a,\infty)
a<x<b ~ (a,b)
x=0\text{ or }x>1 ~ \{0\}\cup(1,\infty)
3<x<1 ~ \emptyset
|2x-1|<3 ~ -1<x<2
|x-1|+|x+1|\le 4 ~ [-2,2]
-x>1 ~ x<-1
1-2x\le 5 ~ [-2,\infty)
2<3x-1\leq 8 ~ (1,3]
x>\frac{1}{2} ~ (0.5,+\infty)
x<\sqrt2 ~ (-\infty,\sqrt2)
x+y>1 ~ 2x+2y>2
x+y<1 ~ 1>y+x
A\cup B ~ A\cup B
\begin{pmatrix}1&2\\3&4\end{pmatrix}^2 ~ \begin{pmatrix}7&10\\15&22\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1\\1\end{pmatrix} ~ \begin{pmatrix}3\\7\end{pmatrix}
\begin{vmatrix}1&2\\2&4\end{vmatrix} ~ 0
\frac12\begin{pmatrix}2&4\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
x>-2,x\ne1,x\ne3 ~ (-2,1)\cup(1,3)\cup(3,\infty)
(1,2)\cup(2,3) ~ (1,3)\setminus\{2\}
x\geq 1 ~ x\in[1,+\infty)
x^2 (x>0) ~ x^2, x>0
y=x^2\;(x\ne 0) ~ y=x^2,x\neq0
\{1,2,3\}\cup\{4,5\} ~ \{1,2,3,4,5\}
\{1,2\}\cap\{2,3\} ~ \{2\}
\operatorname{tg}x ~ \tan x
\operatorname{arctg}2 ~ \arctan 2
[1,2,3] ~ 1,2,3
x ∈ {1, 2} ~ \{1,2\}
$3$ and $4$ ~ 3,4
3$\sqrt{2}$ ~ 3\sqrt2
\left\lceil 2.3\right\rceil ~ 3
(1;2) ~ (1,2)
[1; 2) ~ [1,2)
x=2 or -2 ~ \pm2
1.0e-3 ~ 0.001
∠ABC=60° ~ 60
2\vec{a}+3\vec{b} ~ 3\vec{b}+2\vec{a}
\lvert x-1\rvert ~ |1-x|
P(\overline{A})=0.3 ~ 0.3
f(x)=x^2,x>0 ~ f(x)=x^2, x>0
a=2,b=-1 ~ b=-1,a=2
(a+b)^3 ~ a^3+3a^2b+3ab^2+b^3
\frac{1}{1+\frac{1}{x}} ~ \frac{x}{x+1}
S=\pi r^2 ~ \pi r^2
x^2+y^2-2x+4y=0 ~ (x-1)^2+(y+2)^2=5
3 \text{ cm by } 4 \text{ cm} ~ 3 \text{ cm by } 4 \text{ cm}
4\sqrt{3}\text{ square units} ~ 4\sqrt3
\text{7 hours} ~ 7
\$12.50 ~ 12.5
\text{Sunday} ~ Sunday
x\in\emptyset ~ \emptyset
\left(-\infty ,\,-\frac{1}{2}\right] ~ x\le -\frac12
-\frac{1}{2}\le x ~ x\geq-0.5
n=4k+1,k\in\mathbb{N} ~ n=4m+1, m\in\mathbb{N}
\cos^2 x-\sin^2 x ~ \cos 2x
\frac{2\tan x}{1-\tan^2 x} ~ \tan 2x
10\sqrt{3}\text{ m} ~ 10\sqrt3\text{ meters}
\pm5 ~ \mp5
H<sub>2</sub>O ~ H_2O
-(-42) ~ 42
\sum_{i=1}^{3} i ~ 6
\prod_{i=1}^{4} i^2 ~ 576
\{(1,2)\} ~ (1,2)
\text{no solution} ~ \emptyset
\text{No solutions} ~ \{\}
b<a ~ a>b
a+b<c ~ c>a+b
June 1 ~ \text{June 1}
12:00 \text{ noon} ~ 12:00 noon
"""

OTHER = r"""
42^{\top} ~ 42
6\cap\pi ~ 6
6\log ~ 6
2^{\bmod ~ 2
24/\right ~ 24
10:1 ~ 10:45 a.m.
10:1 ~ 10:45 \text{ a.m.}
0\mathbb{R}<a<4 ~ 0<a<4
7,--,{}25 ~ 7,-2,{}-5
0"42 ~ 42
0'42 ~ 42
0\$42 ~ 42
5$2 ~ 52
x=0\text{}42 ~ 42
42' ~ 42
\boxed{42}\cdot 0 ~ 42
\boxed{42}+7 ~ 42
\boxed{42}/0 ~ 42
42^\circ ~ 42\%
5\% ~ \$5
p\lor q ~ p\land q
x<sup>2</sup> ~ x
x ~ x<sup>2</sup>
5\text{ cents} ~ \$5
B. C. D. ~ B
\{1,\{2\}\} ~ \{1,2\}
42_{} ~ 42
42^{} ~ 42
\sqrt{42 ~ 42
42\sin ~ 42
42\cup ~ 42
42 \text{ or so} ~ 42
42\text{?} ~ 42
42\ldots ~ 42
42+ ~ 42
+ ~ 42
42 \circ ~ 42
42^\prime ~ 42
42\prime ~ 42
42^* ~ 42
42* ~ 42
42\dag ~ 42
\overline{42} ~ 42
\hat{42} ~ 42
\not{42} ~ 42
42\not ~ 42
42\mathbb{Z} ~ 42
\mathbb{42} ~ 42
\in 42 ~ 42
42 \in ~ 42
<42 ~ 42
>42 ~ 42
\neg 42 ~ 42
42\% \% ~ 42
42! ~ 42
4|2 ~ 42
4&2 ~ 42
42\\7 ~ 42
4{}2 ~ 42
4\,2 ~ 42
4\text{}2 ~ 42
4\mathrm{2} ~ 42
4\!2 ~ 42
4{2} ~ 42
\frac{42} ~ 42
\binom{42}{} ~ 42
5 apples ~ 5 oranges
5 cm ~ 5 apples
f(2x) ~ 2f(x)
f(x) ~ xf
a\text{ and }b ~ a\text{ or }b
\lnot p ~ p
0.3(3) ~ 0.9
\$5 ~ €5
10:45 p.m. ~ 10:45 a.m.
x\le 2 ~ x<2
f(m)=2m+1 ~ f(n)=2n+3
\frac{\pi}{6}+n\pi ~ \frac{\pi}{6}+2k\pi
(\pm1,0) ~ (1,0)
|x|<2 ~ (-3,3)
|x|\le2 ~ (-2,2)
p=5,q=2;p=7,q=2 ~ (2,5),(2,7)
x=y=z=1 ~ (1,1,2)
AB=5 ~ 6
\begin{vmatrix}1&2\\3&4\end{vmatrix} ~ 2
\lim_{x\to0}\frac{\sin x}{x} ~ 0
30^\circ ~ \frac{\pi}{6}
1:2 ~ 1/2
n(n-1)=6 ~ 6
k+n ~ n+m
2k ~ 2n
a+b ~ ab
\frac{1}{2}x ~ \frac{1}{2x}
(0,\infty) ~ [0,\infty)
x=1 ~ x=2
x=1,x=2 ~ x=1
x=1 \text{ or } x=2 ~ x=1
1,2,3 ~ (1,2)
-3<x<5 ~ -3<x\le5
5\sqrt{2} ~ 5\sqrt{3}
\frac{5}{3} ~ 1.67
0.6667 ~ \frac23
2^{10} ~ 1000
n^2 ~ n^3
\emptyset ~ \{\emptyset\}
k\pi ~ 2k\pi
60^\circ ~ 120^\circ
60^\circ \text{ or } 120^\circ ~ 60^\circ
y=\frac{\sqrt3}{3}x ~ y=\pm\frac{\sqrt3}{3}x
①③ ~ ①②
12\text{ km/h} ~ 12\text{ m/s}
12\text{ km/h} ~ 12\text{ km}
3\text{ hours} ~ 3\text{ days}
\{x|x>1\} ~ \{x|x\ge1\}
\{x|x>1\} ~ \{x|x<1\}
A=\{1,2\} ~ \{1,3\}
(1,2),(2,3) ~ (1,3),(2,2)
\text{no} ~ \text{yes}
\text{True} ~ \text{False}
1\text{ or }2 ~ 1
5 \pmod 7 ~ 5 \pmod 8
5 \pmod 7 ~ 5
x\equiv 2\pmod5 ~ x\equiv 3\pmod 5
\frac{x^2}{4}+\frac{y^2}{3}=1 ~ \frac{x^2}{3}+\frac{y^2}{4}=1
5:3 ~ 3:5
\$3.50 ~ \$3.05
3,4 ~ 34
1/2/3 ~ 1/(2/3)
-2^2 ~ 4
(-2)^2 ~ -4
2^{3^2} ~ 64
\sin x^2 ~ \sin^2 x
\log_2 x ~ \log_3 x
|x-1| ~ x-1
\overline{AB} ~ \overline{CD}
\vec{a} ~ \vec{b}
\angle A ~ \angle B
i ~ 1
1+2i ~ 1-2i
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
3^x ~ x^3
a_1 ~ a_2
a_{12} ~ a_1 2
x' ~ x
f'(x) ~ f(x)
12:30 ~ 12:45
1/12/2015 ~ 1/12/2016
\frac{0}{0} ~ \frac{0}{0}+1
0.\overline{3} ~ 0.3
5! ~ 5
2 \text{ dozen} ~ 2
\sqrt[3]{2} ~ \sqrt{2}
x>1\text{ or }x<-1 ~ x>1\text{ and }x<-1
x<1, x>-1 ~ x<1 \text{ or } x>-1
\text{(A)} ~ \text{(B)}
A ~ a
AC ~ AB
Cat ~ Act
none ~ one
10^{-5} ~ 10^5
1.2\times10^3 ~ 1.2
3\times 10^8\text{ m/s} ~ 3\times 10^8\text{ km/s}
\lfloor x\rfloor ~ x
5\text{ m}^2 ~ 5\text{ cm}^2
\text{5 apples and 3 pears} ~ 5,4
x^2+1=0 ~ x^2+1
x^2+1 ~ 0
\pm1,\pm2 ~ 1,2
\mathbb{R} ~ \mathbb{Z}
\mathbb{N} ~ \mathbb{Z}
y=x ~ y=-x
x+y ~ x+z
\infty ~ -\infty
+\infty ~ -\infty
1\text{ and }2\text{ and }3 ~ 1,2
\binom{5}{2} ~ \frac52
\lim_{x\to\infty}\sin x ~ 0
\lim_{x\to0}\frac1x ~ \infty
C_5^2 ~ C_5^1
\sum_{k=1}^{5}k ~ 14
x^2<4 ~ (-3,3)
x>a ~ (b,\infty)
x>a ~ x\ge a
x=0\text{ or }x>1 ~ (1,\infty)
[0,\infty] ~ [0,\infty)
x^2-3x+2>0 ~ (1,2)
0<x<1 ~ 0<y<1
0<x<a ~ (0,b)
1<x<3 ~ \{2\}
2x+y>1 ~ x+y>1
A\cup B ~ A\cap B
A\cup B ~ A\cup C
\begin{pmatrix}1&2\\3&4\end{pmatrix}^2 ~ \begin{pmatrix}1&4\\9&16\end{pmatrix}
x \in [1,2] ~ y \in [1,2]
x^2 (x>0) ~ x^2
y=x^2 (x>0) ~ y=x^2 (x<0)
(3\mathrm{,17)} ~ (3,17)
\approx\approx 5 ~ 5
\{1,2\}\cup\{3\} ~ \{1,2\}
f(x)>0 ~ f(x)<0
\operatorname{tg}x ~ \operatorname{ctg}x
[1,2,3] ~ [3,2,1]
x\in\{1,2\} ~ \{1,3\}
3\%\text{ of }5 ~ 3
1 \pm 2 ~ 1 \pm 3
2^{x+1} ~ 2^x+1
12\text{ m/s} ~ 12\text{ m/s}^2
5\text{ kg} ~ 5\text{ g}
x=1\land y=2 ~ x=1\lor y=2
\frac{1}{2}\text{ or }\frac13 ~ \frac12
(A)(B) ~ A
A\text{ or }C ~ A
1-\frac{1}{2} ~ 1\frac12
-1\frac12 ~ -\frac12
10^{1.5} ~ 10^15
3.14\pi ~ 3.14
\sqrt{x}+1 ~ \sqrt{x+1}
e^{2x} ~ e^2x
\log_3 9x ~ \log_3 9 x^2
42\text{ or }43 ~ 42
42; 43 ~ 42
\text{between 41 and 43} ~ 42
42\pm1 ~ 42
[42,42] ~ 42
\{42\} ~ 43
42=43 ~ 43
42\ne43 ~ 42
x\ne 42 ~ 42
x>42 ~ 42
x\approx 41.9 ~ 42
42\equiv 0 ~ 42
42\mid 84 ~ 42
42\sim 43 ~ 42
42 \Rightarrow 43 ~ 43
42\to 43 ~ 43
42^{1} ~ 43
42_2 ~ 42
042_ ~ 42
4\ 2 ~ 42
4.2 ~ 42
4,2 ~ 42
42,0 ~ 42
0,42 ~ 42
4 2/1 ~ 42
42 (mod 5) ~ 42
42\text{ (approx)} ~ 42
42k ~ 42
42i ~ 42
42e ~ 42
42\pi ~ 42
42\% ~ 4.2
\sqrt{42} ~ 42
|42 ~ 42
42| ~ 42
(42 ~ 42
42) ~ 42
{42 ~ 42
42} ~ 42
[42 ~ 42
\frac{42}{} ~ 42
\frac{}{42} ~ 42
42/ ~ 42
/42 ~ 42
42- ~ 42
*42 ~ 42
42\cdot ~ 42
42\times ~ 42
42. 43 ~ 42
42 and more ~ 42
42 or more ~ 42
at least 42 ~ 42
\le 42 ~ 42
\text{not }42 ~ 42
\neg42 ~ 42
-(-(-42)) ~ 42
42\text{th root} ~ 42
\text{42 squared} ~ 42
42 choose 2 ~ 42
42 factorial ~ 42
42 million ~ 42
42 percent ~ 4.2
42 mod 5 ~ 42
42 base 5 ~ 42
42 hundredths ~ 42
42<43 ~ 42
x=42,43 ~ 42
f(42) ~ 42
\{42,42,43\} ~ \{42\}
42\cup43 ~ 42
42\setminus43 ~ 42
42\bmod 100 ~ 43
42\underline{} ~ 42
\underline{\quad} 42 ~ 42
42\hspace{3mm} ~ 42
42\vspace ~ 42
42\label{x} ~ 42
42\tag{1} ~ 42
42\mathbb ~ 42
42\overline{3} ~ 42
4\overline{2} ~ 42
42\vec ~ 42
\vec{42} ~ 42
42\infty ~ 42
42\emptyset ~ 42
42\mathcal{O} ~ 42
42\angle ~ 42
42\nabla ~ 42
42\\43 ~ 42
42&43 ~ 42
42#1 ~ 42
42@ ~ 42
42^ ~ 42
42_ ~ 42
42" ~ 42
42`` ~ 42
42:00 ~ 42
42:1 ~ 42
42'' ~ 42
42° ~ 42\text{ cm}
\text{4}2 ~ 42
4\mathbf{2} ~ 42
4$$2 ~ 42
4\(2\) ~ 42
4\displaystyle 2 ~ 42
4\phantom{x}2 ~ 42
4\color{red}2 ~ 42
4\right.2 ~ 42
4\left.2\right. ~ 42
\boxed{4}2 ~ 42
4\boxed{2} ~ 42
\boxed{4}\boxed{2} ~ 42
42 \boxed{41} ~ 42
\boxed{42} \boxed{41} ~ 42
\boxed{42} \text{ or } 41 ~ 42
41 \boxed{42} ~ 42
41, so \boxed{42} ~ 42
\boxed{42}\% ~ 4200
\boxed{42}! ~ 42
\boxed{42}^2 ~ 42
-\boxed{42} ~ 42
2\boxed{42} ~ 42
\frac{\boxed{42}}{2} ~ 42
\sqrt{\boxed{42}} ~ 42
x>\boxed{42} ~ 42
x\ne\boxed{42} ~ 42
not \boxed{42} ~ 42
\boxed{42} is wrong ~ 42
p\to q ~ p\land q
p\leftrightarrow q ~ p\to q
p\land q\lor r ~ p\lor q\land r
\forall x ~ \exists x
\sin^{-1}x ~ \frac{1}{\sin x}
x^{-1} ~ x
x<sup>3</sup> ~ x<sup>2</sup>
H<sub>2</sub>O ~ H_3O
5\text{ hours} ~ 5\text{ minutes}
5\text{ °C} ~ 5\text{ °F}
5\% ~ 5^\circ
€5 ~ £5
+5 ~ -5
\pm5 ~ 5
\mp5 ~ -5
\sum_{i=1}^{3} i ~ 3i
\{(1,2)\} ~ (2,1)
\{(1,2),(3,4)\} ~ (1,2)
\{(0,1)\} ~ 0<x<1
\text{no solution} ~ 0
b<a ~ a<b
b<a ~ a\ge b
b<a ~ c>b
June 1 ~ \text{June 2}
X\foo ~ x\foo
"""
